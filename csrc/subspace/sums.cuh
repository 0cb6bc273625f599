// Sums over tiles in an order that depends on shapes alone. The list of tiles is cut into groups; a block of threads
// walks its group and adds into its own accumulators, and a second kernel adds those of all groups.
#pragma once
#include "tile.cuh"

#ifndef WX_SUB_SUM_BYTES
#define WX_SUB_SUM_BYTES 73728
#endif
#ifndef WX_SUB_COLUMN_GROUPS
#define WX_SUB_COLUMN_GROUPS 1024
#endif

namespace wx::gpu::sub {

constexpr int kSumBytes = WX_SUB_SUM_BYTES;  // of shared memory for a block: three of them on a multiprocessor
constexpr int kSumBlocks = 384;              // three on each of about 128 multiprocessors

// Groups of the kinds that leave one number for each column: at most 64 MiB of float32, about.
inline int most_column_groups(int64_t dim) {
  constexpr int64_t kMost = WX_SUB_COLUMN_GROUPS, kLeast = kMost < 16 ? kMost : 16;
  return static_cast<int>(max(kLeast, min(kMost, (int64_t{1} << 24) / dim)));
}

// A window that begins in the columns [range width, (range + 1) width) of zx is added by the block of that range: each
// has width + tile accumulators, which fit in shared memory however many columns there are. Otherwise (large tiles)
// they are `data` itself. data [batch, total_groups, ranges, stored].
template <class C>
struct Sums {
  C* data;
  int groups, first_group, total_groups;  // of this launch, and of all
  int tiles;                              // of a group, in this launch
  int ranges;
  int64_t width, places, stored;
  bool on_chip, folded;  // folded: one range, and of each column one number is stored

  // How it is cut, for so many accumulators in a block's shared memory.
  __host__ static Sums of(const Common& o, int64_t room) {
    Sums s{};
    s.ranges = 1;
    s.width = s.places = s.stored = o.unrolled();
    s.on_chip = s.folded = s.width <= room;
    if (s.on_chip) {
      s.stored = o.dim;
    } else if (const int64_t width = room - o.tile(); width >= o.tile() / 4) {
      s.ranges = static_cast<int>(ceil_div(o.unrolled(), width));
      s.width = width;
      s.places = s.stored = width + o.tile();
      s.on_chip = true;
    }
    return s;
  }
  // Groups that leave one number for each column.
  __host__ static Sums of_columns(int64_t dim, C* data) {
    Sums s{};
    s.data = data;
    s.ranges = 1;
    s.width = s.places = s.stored = dim;
    s.folded = true;
    return s;
  }
  // Enough blocks for the device; but a group has half as many elements as accumulators, about.
  __host__ int most_groups(const Common& o, int64_t items, int blocks) const {
    const int64_t least = 1 + (places >> (o.bits + 1)), most = on_chip ? max(1, blocks / ranges) : 256;
    return static_cast<int>(min(ceil_div(items, least), most));
  }
  // The groups of a launch.
  __host__ void cut(int items, int most) {
    tiles = ceil_div(items, min(items, most));
    groups = ceil_div(items, tiles);
  }
  __device__ C* slice(int group, int range, int64_t row) const {
    return data + ((row * total_groups + first_group + group) * ranges + range) * stored;
  }
};

// A float64 sum. Of float64 numbers what each addition loses is summed, too.
template <class C>
struct Total {
  double sum = 0, lost = 0;

  __device__ void add(double x) {
    const double next = __dadd_rn(sum, x);
    if constexpr (sizeof(C) == 8) {
      const double added = __dsub_rn(next, sum);
      lost += __dadd_rn(__dsub_rn(sum, __dsub_rn(next, added)), __dsub_rn(x, added));
    }
    sum = next;
  }
  __device__ void add(const Total& other) {
    add(other.sum);
    lost += other.lost;
  }
  __device__ C value() const { return static_cast<C>(sum + lost); }
};

// z_bar_k = fl(c_k sum), float64 sums over the groups in their order. A block has 32 columns, a warp takes every
// kWarps-th group of them.
template <class S, class C>
__global__ void __launch_bounds__(kThreads, 2) add_groups(const Sums<S> s, const Common o, const C* c, C* z_bar) {
  __shared__ Total<C> parts[kThreads];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32, row = blockIdx.y;
  Total<C> sum;
  if (k < o.dim) {
    const int r = s.folded ? 0 : o.stratum_of(k);
    const int64_t low = o.low(r), width = s.folded ? o.dim : o.width(r), shift = static_cast<int64_t>(r) << o.bits;
    const int64_t end = s.folded ? o.dim : low + shift + width + o.tile();
    for (int g = threadIdx.x / 32; g < s.total_groups; g += kWarps) {
      for (int64_t at = k + shift; at < end; at += width) {
        const int64_t before = at - s.places + 1;
        const int first = before > 0 ? static_cast<int>(ceil_div(before, s.width)) : 0;
        for (int range = first; range < s.ranges && range * s.width <= at; range++)
          sum.add(s.data[((row * s.total_groups + g) * s.ranges + range) * s.stored + at - range * s.width]);
      }
    }
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || k >= o.dim) return;
  for (int w = 1; w < kWarps; w++) sum.add(parts[32 * w + threadIdx.x]);
  const C total = sum.value();
  z_bar[row * o.dim + k] = c ? mul(c[k], total) : total;
}

template <class S, class C>
void launch_add_groups(const Sums<S>& sums, const Common& common, const C* c, C* z_bar, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(common.dim, 32)), common.batch);
  WX_LAUNCH((add_groups<S, C>), grid, kThreads, stream, sums, common, c, z_bar);
}

}  // namespace wx::gpu::sub
