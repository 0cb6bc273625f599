// What kernels need on the device. No torch header here or in any kernel header: nvcc compiles them fast, and
// tests/simt/ compiles the same source for the host, where simt.h stands for the GPU.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cooperative_groups.h>

#define WX_LAUNCH(kernel, grid, threads, stream, ...) WX_LAUNCH_SHARED(kernel, grid, threads, 0, stream, __VA_ARGS__)
#define WX_LAUNCH_SHARED(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
#define WX_LAUNCH_COOPERATIVE(kernel, grid, threads, shared_bytes, stream, ...) \
  wx::gpu::launch_cooperative(kernel, grid, threads, shared_bytes, stream, __VA_ARGS__)
#define WX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace wx::gpu {

template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                        const A&... arguments) {
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // an error stays for check_launches()
}

__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(fp16 x) { return __half2float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

template <class C>
__device__ void narrow(C x, bf16& out) {
  out = __float2bfloat16_rn(static_cast<float>(x));
}
template <class C>
__device__ void narrow(C x, fp16& out) {
  out = __float2half_rn(static_cast<float>(x));
}
template <class C>
__device__ void narrow(C x, float& out) {
  out = static_cast<float>(x);
}
template <class C>
__device__ void narrow(C x, double& out) {
  out = x;
}

}  // namespace wx::gpu

#else
#include "vec.h"

namespace wx::gpu {
using wx::bf16;
using wx::fp16;
using wx::narrow;
using wx::widen;
}  // namespace wx::gpu
#endif

namespace wx::gpu {

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

// A dtype that is known when a kernel runs.
enum class Format { kFloat, kDouble, kHalf, kBfloat };

// x / y and x % y; 64-bit division costs about ten times a 32-bit one.
__device__ inline int64_t divide(int64_t x, int64_t y) {
  if (((x | y) >> 32) == 0) return static_cast<uint32_t>(x) / static_cast<uint32_t>(y);
  return x / y;
}

template <class To, class From>
__device__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <class T>
__device__ bool aligned(const T* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Copies from global to shared memory that do not pass through registers, so that many are under way at once. A thread
// sees its own copies after wait(), the block after a barrier then.
struct AsyncCopy {
  template <class P>
  __device__ void copy(P* shared, const P* global) {
    static_assert(sizeof(P) == 4 || sizeof(P) == 8 || sizeof(P) == 16);
#ifdef __CUDACC__
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (sizeof(P) == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(sizeof(P)) : "memory");
#else
    *shared = *global;
#endif
  }
  __device__ void wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  }
};

// n numbers side by side, from global to shared memory, by all threads of the block.
template <int kThreads, class T>
__device__ void copy_async(T* shared, const T* global, int n) {
  AsyncCopy async;
  int done = 0;
  if (aligned(shared, 16) && aligned(global, 16)) {
    constexpr int kWide = 16 / sizeof(T);
    using Wide = Pack<T, kWide>;
    for (int i = threadIdx.x; i < n / kWide; i += kThreads)
      async.copy(reinterpret_cast<Wide*>(shared) + i, reinterpret_cast<const Wide*>(global) + i);
    done = n / kWide * kWide;
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    if constexpr (sizeof(T) >= 4)
      async.copy(shared + i, global + i);
    else
      shared[i] = global[i];
  }
  async.wait();
}

// The sum over the block, in every thread, always in the same order. All threads must call it.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double warps[32];
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // warps may still be read from the call before
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kThreads / 32; i++) sum += warps[i];
  return sum;
}

// The largest value of the block, in every thread; NaN counts for nothing.
template <int kThreads>
__device__ double block_max(double value) {
  __shared__ double warps[32];
  for (int offset = 16; offset; offset /= 2) value = fmax(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double largest = warps[0];
  for (int i = 1; i < kThreads / 32; i++) largest = fmax(largest, warps[i]);
  return largest;
}

}  // namespace wx::gpu
