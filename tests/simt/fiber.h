// Fibers: stacks, the switch between them, and what the sanitizers have to know about both; the hand-over between OS
// threads. For simt.cpp.
#pragma once
#include "simt.h"

#include <link.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(SIMT_RACES)  // the rest of the program is compiled with the thread sanitizer
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {
namespace {

constexpr size_t kStack = 256 << 10;  // the sanitizers need deep frames; pages are touched when used

struct Fiber : Thread {
  bool done = false;
  const void* stack = nullptr;
  size_t stack_size = 0;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  void* races = nullptr;  // the thread that the race check sees
  Fiber* home = nullptr;  // the OS thread's own stack
};

Fiber& me() { return *static_cast<Fiber*>(current); }

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* next);
asm(R"(
.section .text.simt_switch,"axG",@progbits,simt_switch,comdat
.weak simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
.text
)");
#endif

enum Order { kForward, kReverse, kRandom };
Order order = kForward;

// Who comes after whom.
void permute(std::vector<unsigned>& p, unsigned seed) {
  const unsigned n = p.size();
  for (unsigned i = 0; i < n; i++) p[i] = order == kReverse ? n - 1 - i : i;
  uint64_t state = seed * 77 + 1;
  for (unsigned i = n; order == kRandom && i > 1; i--) {
    state = state * 6364136223846793005u + 1;
    std::swap(p[i - 1], p[(state >> 33) % i]);
  }
}

// The right to run. A futex by hand: the sanitizer would take any other lock for synchronisation between the blocks.
class Baton {
 public:
  void wait() {
    while (!up_.load()) futex(FUTEX_WAIT_PRIVATE, 0);
    up_.store(0);
  }
  void pass() {
    up_.store(1);
    futex(FUTEX_WAKE_PRIVATE, 1);
  }

 private:
  std::atomic<int> up_{0};
  void futex(int operation, int value) { syscall(SYS_futex, &up_, operation, value, nullptr, nullptr, 0); }
};

// What every fiber does first on its stack.
void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  Fiber* home = me().home;  // the first fiber to arrive comes from there, and learns where that stack is
  const bool learn = home && !home->stack;
  __sanitizer_finish_switch_fiber(fake_stack, learn ? &home->stack : nullptr, learn ? &home->stack_size : nullptr);
#endif
}

void switch_to(Fiber* to) {
  Fiber* from = &me();
  current = to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from->done ? nullptr : &from->fake_stack, to->stack, to->stack_size);
#endif
#if defined(SIMT_RACES)
  __tsan_switch_to_fiber(to->races, 1);  // 1: this orders nothing
#endif
#if defined(__x86_64__)
  simt_switch(&from->pointer, to->pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
  arrived(from->fake_stack);
}

#if defined(SIMT_RACES)
void acquire(void* p) { __tsan_acquire(p); }
void release(void* p) { __tsan_release(p); }
void* races_here() { return __tsan_get_current_fiber(); }
void* new_races() { return __tsan_create_fiber(0); }
#else
void acquire(void*) {}
void release(void*) {}
void* races_here() { return nullptr; }
void* new_races() { return nullptr; }
#endif

// A stack for each thread of a worker, and what the race check sees of it, which is slow to make. Kept for all
// launches.
void prepare(Fiber& f, unsigned worker, void (*body)()) {
  struct Seat {
    char* stack;
    void* races;
  };
  static std::deque<std::deque<Seat>> pool;
  while (pool.size() <= worker) pool.emplace_back();
  std::deque<Seat>& seats = pool[worker];
  constexpr size_t kAtOnce = 32;
  while (seats.size() <= f.rank) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, kAtOnce * kStack, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of a block");
    for (size_t i = 0; i < kAtOnce; i++) {
      char* stack = static_cast<char*>(p) + i * kStack;
      mprotect(stack, 4096, PROT_NONE);  // an overflow ends here, not in the next stack
      seats.push_back({stack, nullptr});
    }
  }
  Seat& seat = seats[f.rank];
  if (!seat.races) seat.races = new_races();
  f.races = seat.races;
  f.stack = seat.stack;
  f.stack_size = kStack;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(seat.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  top -= 6;  // the registers that simt_switch pops
  f.pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = seat.stack;
  f.context.uc_stack.ss_size = kStack;
  makecontext(&f.context, body, 0);
#endif
}

thread_local char anchor;  // lies between the __shared__ variables

// Fills the __shared__ variables of this OS thread with NaN: all that this program or library has of thread_local
// variables without an initial value. It also makes them exist: they would otherwise come into being with the first
// access, by a thread of the kernel, and that would be a write that the others are not ordered after.
void fill_static_shared() {
  struct Extent {
    ptrdiff_t begin = 0;
    size_t size = 0;
  };
  anchor = 0;
  static const Extent extent = [] {
    Extent found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const char* data = static_cast<const char*>(info->dlpi_tls_data);
          for (int i = 0; data && i < info->dlpi_phnum; i++) {
            const auto& h = info->dlpi_phdr[i];
            if (h.p_type != PT_TLS || &anchor < data || &anchor >= data + h.p_memsz) continue;
            const auto begin = static_cast<ptrdiff_t>(h.p_filesz);
            *static_cast<Extent*>(out) = {data - &anchor + begin, h.p_memsz - h.p_filesz};
          }
          return 0;
        },
        &found);
    if (!found.size) throw std::runtime_error("simt: the static shared memory was not found");
    return found;
  }();
  std::memset(&anchor + extent.begin, 0xff, extent.size);
}

}  // namespace
}  // namespace simt
