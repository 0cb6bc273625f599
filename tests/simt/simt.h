// A GPU for the tests: CUDA kernels as ordinary C++. simt.cpp is the machine; here is what kernels see of it, and that
// list is complete: a kernel that needs more of CUDA adds it here.
//
// A thread of a kernel is a fiber, a block has an OS thread of its own where blocks have to be alive together
// (cooperative launches, race checks), and only one of all of them runs at any time. Fibers change only at barriers and
// shuffles, blocks only at a grid sync and at their end, in the order that simt_order() sets. A barrier that some
// thread never reaches (a hang on a GPU) ends the program with a message.
//
// It does not show what is about memory ordering (every atomic is acquire and release, a fence does nothing),
// coalescing, bank conflicts, occupancy, inline PTX, the rounding of GPU-only functions, or speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

#define SIMT_VECTOR(name, T)                                                     \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                             \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(int, int)
SIMT_VECTOR(uint, unsigned)
SIMT_VECTOR(float, float)
SIMT_VECTOR(double, double)
#undef SIMT_VECTOR

namespace simt {

constexpr unsigned kWarp = 32;

struct Thread {
  uint3 index;
  unsigned rank;  // in the block
};
struct BlockView {
  uint3 index;
  dim3 size, grid;
  unsigned char* shared;
};
extern Thread* current;
extern BlockView* block;

// A place in the source: barriers are named by it, and can be made to do nothing (simt_drop).
struct Place {
  const char* file;
  int line;
};

void block_barrier(Place place);
void grid_barrier(Place place);
// Every lane's value, once all lanes of the mask have come; `ordered`: what they wrote is seen, too. Only simt.cpp
// reads them: the race check sees accesses from here, and would miss their order.
struct Lanes;
const Lanes* exchange(unsigned mask, uint64_t value, const char* what, bool ordered, Place place);
uint64_t value_of(const Lanes* lanes, unsigned lane);
[[noreturn]] void fail(const char* what);

struct Launch {
  dim3 grid, size;
  size_t shared;
  bool cooperative;
  const void* kernel;
  void (*body)(void*);
  void* arguments;
};
void run(const Launch& launch);
int resident_blocks(const void* kernel, int threads, int shared_bytes);

template <class... P, class... A>
void launch(bool cooperative, void (*kernel)(P...), dim3 grid, dim3 size, size_t shared, A&&... a) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, {std::forward<A>(a)...}};
  const auto body = [](void* p) {
    auto* c = static_cast<Call*>(p);
    std::apply(c->kernel, c->arguments);
  };
  run({grid, size, shared, cooperative, reinterpret_cast<const void*>(kernel), body, &call});
}

// The value of lane source(lane), which must be in the mask.
template <class T, class F>
T shuffle(unsigned mask, T value, const char* what, const F& source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Lanes* all = exchange(mask, bits, what, false, {});
  const unsigned from = source(current->rank % kWarp) % kWarp;
  if (!(mask >> from & 1)) fail("a shuffle reads from a lane that is not in its mask");
  bits = value_of(all, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

// For the tests. The order of threads and of blocks: 0 forward, 1 reverse, 2 random.
extern "C" void simt_order(int order);
// The device that the queries below describe: 4 SMs, 64 KiB and cooperative launches unless told otherwise.
extern "C" void simt_device(int sms, int shared_bytes, int cooperative);
// Every barrier reached since simt_drop(), one "file:line kind" a line; the text is valid until the next call.
extern "C" const char* simt_barriers();
// Makes the barrier at this place, "file:line", do nothing; a grid sync becomes __syncthreads. nullptr: none.
extern "C" void simt_drop(const char* place);

// --- launches, shared memory, host-side queries ---------------------------------------------------------------------

#define WX_LAUNCH(kernel, grid, threads, stream, ...) WX_LAUNCH_SHARED(kernel, grid, threads, 0, stream, __VA_ARGS__)
#define WX_LAUNCH_SHARED(kernel, grid, threads, shared_bytes, stream, ...) \
  (static_cast<void>(stream), simt::launch(false, kernel, grid, threads, shared_bytes, ##__VA_ARGS__))
#define WX_LAUNCH_COOPERATIVE(kernel, grid, threads, shared_bytes, stream, ...) \
  (static_cast<void>(stream), simt::launch(true, kernel, grid, threads, shared_bytes, ##__VA_ARGS__))
#define WX_DYNAMIC_SHARED(name) unsigned char* const name = simt::block->shared

namespace wx::gpu {

inline void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::grid_barrier({file, line});
}

int sm_count();
int max_shared_bytes();
bool cooperative_launch();
template <class K>
int resident_blocks(K kernel, int threads, int shared_bytes) {
  return simt::resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

}  // namespace wx::gpu

// --- CUDA C++ --------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local
#define threadIdx (static_cast<const uint3&>(simt::current->index))
#define blockIdx (static_cast<const uint3&>(simt::block->index))
#define blockDim (static_cast<const dim3&>(simt::block->size))
#define gridDim (static_cast<const dim3&>(simt::block->grid))

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::block_barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::exchange(mask, 0, "__syncwarp", true, {file, line});
}

// width: the warp in parts of so many lanes, as in CUDA.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, "__shfl_sync", [&](unsigned lane) {
    return (lane & ~(width - 1u)) | (static_cast<unsigned>(source) & (width - 1u));
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  return simt::shuffle(mask, value, "__shfl_xor_sync", [&](unsigned lane) {
    const unsigned from = lane ^ static_cast<unsigned>(flip);
    return (from & ~(width - 1u)) > (lane & ~(width - 1u)) ? lane : from;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return simt::shuffle(mask, value, "__shfl_down_sync", [&](unsigned lane) {
    return (lane & (width - 1u)) + by < static_cast<unsigned>(width) ? lane + by : lane;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return simt::shuffle(mask, value, "__shfl_up_sync",
                       [&](unsigned lane) { return (lane & (width - 1u)) >= by ? lane - by : lane; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const simt::Lanes* all = simt::exchange(mask, predicate != 0, "__ballot_sync", false, {});
  unsigned bits = 0;
  for (unsigned lane = 0; lane < simt::kWarp; lane++)
    if (mask >> lane & 1) bits |= static_cast<unsigned>(simt::value_of(all, lane)) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Integers only: sums of floats must not depend on the schedule.
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicAdd(T* p, std::common_type_t<T> value) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicExch(T* p, std::common_type_t<T> value) {
  return __atomic_exchange_n(p, value, __ATOMIC_ACQ_REL);
}
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> atomicCAS(T* p, std::common_type_t<T> expected,
                                                     std::common_type_t<T> value) {
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Cache hints.
#define SIMT_LOAD(name) \
  template <class T>    \
  T name(const T* p) {  \
    return *p;          \
  }
#define SIMT_STORE(name)                         \
  template <class T>                             \
  void name(T* p, std::common_type_t<T> value) { \
    *p = value;                                  \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)
#undef SIMT_LOAD
#undef SIMT_STORE

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
// One rounding each: this file and the kernels are compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

using std::max;
using std::min;
