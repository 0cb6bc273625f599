// Sizes of a call, and into how many blocks it is cut.
#pragma once
#include "../common/parts.cuh"

#ifndef WX_FW_THREADS
#define WX_FW_THREADS 256
#endif
#ifndef WX_FW_GROUPS
#define WX_FW_GROUPS 1024
#endif

namespace wx::gpu::fw {

constexpr int kMostGroups = WX_FW_GROUPS;  // of filters: so many parts of each Gram matrix, at the most
constexpr int64_t kWantedBlocks = 1056;    // eight on each of 132 multiprocessors

struct Sizes {
  int64_t filters;
  int batch, banks, taps;

  __host__ __device__ int64_t bank() const { return filters * taps; }          // numbers of weight[e], or of out[b]
  __host__ __device__ int64_t matrix() const { return int64_t{taps} * taps; }  // of a[b, e]
  __host__ __device__ int64_t matrices() const { return int64_t{batch} * banks * matrix(); }
};

}  // namespace wx::gpu::fw
