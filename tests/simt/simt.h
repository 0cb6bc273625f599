// A GPU for the tests: CUDA kernels as ordinary C++, one fiber for each thread of a block, block after block.
//
// Fibers change only at barriers and shuffles, in the order that simt_order() sets. A barrier that some thread never
// reaches (a hang on a GPU) ends the program with a message. It does not show what is about memory ordering between
// blocks, coalescing, occupancy or speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace simt {

constexpr size_t kStack = 256 << 10;  // the sanitizers need deep frames; pages are touched when used
constexpr unsigned kWarp = 32;

enum Order { kForward, kReverse, kRandom };
inline Order order = kForward;  // of the threads of a block, and of the blocks

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  unsigned index = 0;
  bool done = false;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // of even and odd generations: a fast lane may be one exchange ahead
};

struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> threads;
  std::vector<unsigned> turns;  // the next thread to run after each
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned alive = 0;
  uint64_t idle = 0;  // switches since somebody got on
  Fiber scheduler;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block* block = nullptr;
inline Fiber* current = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s (block %u,%u,%u, thread %u)\n", what, block->index.x, block->index.y, block->index.z,
               current->index);
  std::abort();
}

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

inline void switch_to(Fiber* to) {
  Fiber* from = current;
  current = to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from->done ? nullptr : &from->fake_stack, to->stack, to->stack ? kStack : 0);
#endif
#if defined(__x86_64__)
  simt_switch(&from->pointer, to->pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

inline Fiber* next_thread() {
  unsigned i = current->index;
  for (unsigned n = block->threads.size(); n; n--) {
    i = block->turns[i];
    if (!block->threads[i].done) return &block->threads[i];
  }
  return &block->scheduler;
}

inline void release(Barrier& b) {
  b.arrived = 0;
  b.generation++;
  block->idle = 0;
}

inline void wait(Barrier& b, unsigned expected) {
  const unsigned generation = b.generation;
  if (++b.arrived == expected) return release(b);
  while (b.generation == generation) {
    if (++block->idle > 4 * block->threads.size() + 64) fail("a barrier or shuffle that some thread does not reach");
    Fiber* next = next_thread();
    if (next != current) switch_to(next);
  }
}

inline void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  block->body(block->arguments);
  current->done = true;
  block->alive--;
  block->idle = 0;
  if (block->alive && block->barrier.arrived == block->alive) release(block->barrier);  // exited threads do not count
  switch_to(next_thread());
  std::abort();
}

inline std::vector<unsigned> permutation(unsigned n, unsigned seed) {
  std::vector<unsigned> p(n);
  for (unsigned i = 0; i < n; i++) p[i] = order == kReverse ? n - 1 - i : i;
  uint64_t state = seed * 77 + 1;
  for (unsigned i = n; order == kRandom && i > 1; i--) {
    state = state * 6364136223846793005u + 1;
    std::swap(p[i - 1], p[(state >> 33) % i]);
  }
  return p;
}

inline void run_block(Block& b, char* stacks, unsigned seed) {
  const unsigned n = b.size.x * b.size.y * b.size.z;
  b.threads.assign(n, Fiber{});
  b.turns.resize(n);
  b.warps.assign((n + kWarp - 1) / kWarp, Warp{});
  b.barrier = {};
  b.alive = n;
  b.idle = 0;
  const std::vector<unsigned> turns = permutation(n, seed);
  for (unsigned i = 0; i < n; i++) {
    Fiber& f = b.threads[i];
    f.index = i;
    f.stack = stacks + i * kStack;
    b.turns[turns[i]] = turns[(i + 1) % n];
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(f.stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(thread_main);
    top -= 6;  // the registers that simt_switch pops
    f.pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, thread_main, 0);
#endif
  }
  block = &b;
  current = &b.scheduler;
  switch_to(&b.threads[turns[0]]);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 size, A&&... a) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, {std::forward<A>(a)...}};
  Block b;
  b.size = size;
  b.grid = grid;
  b.arguments = &call;
  b.body = [](void* p) {
    auto* c = static_cast<Call*>(p);
    std::apply(c->kernel, c->arguments);
  };
  const size_t threads = size_t{size.x} * size.y * size.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  static std::unique_ptr<char[]> stacks;
  static size_t held = 0;
  if (threads > held) stacks.reset(new char[(held = threads) * kStack]);
  for (unsigned i : permutation(blocks, 7)) {
    b.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(b, stacks.get(), i);
  }
}

// Every lane's value, once all lanes of the warp have come.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  const unsigned lane = current->index % kWarp, first = current->index - lane;
  const unsigned lanes = std::min<unsigned>(kWarp, block->threads.size() - first);
  if (mask != 0xffffffffu || lanes != kWarp) fail("a shuffle must name, and have, a whole warp");
  Warp& warp = block->warps[current->index / kWarp];
  const unsigned parity = warp.barrier.generation & 1;
  warp.values[parity][lane] = value;
  wait(warp.barrier, lanes);
  return warp.values[parity];
}

inline dim3 thread_index() {
  const unsigned i = current->index, x = block->size.x, y = block->size.y;
  return {i % x, i / x % y, i / (x * y)};
}

}  // namespace simt

extern "C" __attribute__((used, visibility("default"))) inline void simt_order(int order) {
  simt::order = static_cast<simt::Order>(order);
}

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block->index)
#define blockDim (simt::block->size)
#define gridDim (simt::block->grid)
#define WX_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), simt::launch(kernel, grid, threads, __VA_ARGS__))

inline void __syncthreads() { simt::wait(simt::block->barrier, simt::block->alive); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = simt::exchange(mask, bits);
  std::memcpy(&value, &all[(simt::current->index % simt::kWarp) ^ offset], sizeof(T));
  return value;
}

using std::max;
using std::min;
