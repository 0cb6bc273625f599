// Sums whose order depends on shapes alone: over the lanes of a warp, and over parts that blocks left in memory.
#pragma once
#include "formats.cuh"

#ifndef WX_PARTS_WARPS
#define WX_PARTS_WARPS 8
#endif

namespace wx::gpu {

template <class X>
__host__ __device__ constexpr X ceil_div(X x, X y) {
  return (x + y - 1) / y;
}

// Tiles in groups: a block has the tiles of one, one after the other, and leaves one part.
struct Groups {
  int64_t tiles, each;
  int count;

  __host__ static Groups of(int64_t items, int tile, int64_t most) {
    const int64_t tiles = ceil_div<int64_t>(items, tile), each = ceil_div(tiles, most);
    return {tiles, each, static_cast<int>(ceil_div(tiles, each))};
  }
  __device__ int64_t begin(int64_t group) const { return group * each; }
  __device__ int64_t end(int64_t group) const { return min(tiles, (group + 1) * each); }
};

// Which of N sums a lane has: those from `first` on, the first `count` of its values.
struct Kept {
  int first, count;
};

// v[i] summed over kLanes neighbours, for all i < N: each has a share of the sums afterwards. At every step a lane
// sends the half of its values that it does not keep, so that it takes N + 5 shuffles, not 5 N.
template <int N, int kLanes, int M, class C>
__device__ Kept sum_lanes(C (&v)[M], Kept kept = {0, N}) {
  if constexpr (kLanes == 1) {
    return kept;
  } else {
    constexpr int kHalf = (N + 1) / 2;
    const bool upper = threadIdx.x & (kLanes / 2);
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const C low = v[i], high = i + kHalf < N ? v[i + kHalf < N ? i + kHalf : 0] : C(0);
      v[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kLanes / 2);
    }
    const int mine = min(kept.count, kHalf);
    return sum_lanes<kHalf, kLanes / 2>(v,
                                        upper ? Kept{kept.first + kHalf, kept.count - mine} : Kept{kept.first, mine});
  }
}

// Where sums go: number k to the last tensor that begins at or before it.
template <int N>
struct Targets {
  Output at[N];
  int64_t begin[N + 1];
};

// Sum k = parts[0][k] + parts[1][k] + ..., in float64. A block has 32 of them, a warp takes every kPartWarps-th part.
constexpr int kPartWarps = WX_PARTS_WARPS;
template <class C, int N>
__global__ void __launch_bounds__(32 * kPartWarps) add_parts(const C* parts, int count, const Targets<N> to) {
  __shared__ double sums[kPartWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = to.begin[N], k = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (k < n)
    for (int i = warp; i < count; i += kPartWarps) sum += static_cast<double>(parts[i * n + k]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || k >= n) return;
  for (int i = 1; i < kPartWarps; i++) sum += sums[i][lane];
#pragma unroll
  for (int i = 0; i < N; i++)
    if (k >= to.begin[i] && k < to.begin[i + 1])
      store(to.at[i].data, to.at[i].format, k - to.begin[i], static_cast<C>(sum));
}

template <class C, int N>
void launch_add_parts(const C* parts, int count, const Targets<N>& to, cudaStream_t stream) {
  if (const int64_t n = to.begin[N])
    WX_LAUNCH((add_parts<C, N>), static_cast<unsigned>((n + 31) / 32), 32 * kPartWarps, stream, parts, count, to);
}

// out[0 .. n) = the sums.
template <class C>
void launch_add_parts(const C* parts, int count, const Output& out, int64_t n, cudaStream_t stream) {
  launch_add_parts(parts, count, Targets<1>{{out}, {0, n}}, stream);
}

}  // namespace wx::gpu
