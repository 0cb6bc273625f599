// What kernels need on the device. No torch header here or in any kernel header: nvcc compiles them fast, and
// tests/simt/ compiles the same source for the host, where simt.h stands for the GPU.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WX_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)

namespace wx::gpu {

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

// x / y and x % y; 64-bit division costs about ten times a 32-bit one.
__device__ inline int64_t divide(int64_t x, int64_t y) {
  if (((x | y) >> 32) == 0) return static_cast<uint32_t>(x) / static_cast<uint32_t>(y);
  return x / y;
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

}  // namespace wx::gpu
