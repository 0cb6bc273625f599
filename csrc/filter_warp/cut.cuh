// Sizes of a call, and how it is cut into blocks: by its shape alone where sums depend on it.
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
};

template <class X>
__host__ __device__ constexpr X ceil_div(X x, X y) {
  return (x + y - 1) / y;
}

// Tiles of filters in groups: a block has the tiles of one, one after the other, and adds to its own part.
struct Groups {
  int64_t tiles, each;
  int count;

  __host__ static Groups of(int64_t filters, int tile, int most) {
    const int64_t tiles = ceil_div<int64_t>(filters, tile), each = ceil_div<int64_t>(tiles, most);
    return {tiles, each, static_cast<int>(ceil_div(tiles, each))};
  }
  __device__ int64_t begin(int group) const { return group * each; }
  __device__ int64_t end(int group) const { return min(tiles, (group + 1) * each); }
};

}  // namespace wx::gpu::fw
