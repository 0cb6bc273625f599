// z_bar = P'g of the tiled kinds. Each gradient is read once, where it lies.
#pragma once
#include "sums.cuh"
#include "tile_forward.cuh"

namespace wx::gpu::sub {

// The tiles of a group that have a block in this range, in order. All threads ask for the next one together.
template <class T, int N>
class Walk {
 public:
  __device__ Walk(const Table<Common, Part<T>, N>& table, const Sums<Compute<T>>& s, int group, int range)
      : table_(table), low_(range * s.width), high_(low_ + s.width), all_(s.ranges == 1) {
    next_ = group * s.tiles;
    end_ = min(table.items, next_ + s.tiles);
  }

  // -1 after the last. Every warp looks for itself: what the threads do next must not hang on shared memory.
  __device__ int next() {
    if (all_) return next_ < end_ ? next_++ : -1;
    while (!mask_) {
      if (next_ >= end_) return -1;
      const int item = next_ + static_cast<int>(threadIdx.x % 32);
      mask_ = __ballot_sync(0xffffffffu, item < end_ && touches(item));
      next_ += 32;
    }
    const int lane = __ffs(static_cast<int>(mask_)) - 1;
    mask_ &= mask_ - 1;
    return next_ - 32 + lane;
  }

  __device__ bool in_range(int64_t column) const { return column >= low_ && column < high_; }

 private:
  const Table<Common, Part<T>, N>& table_;
  int64_t low_, high_;
  int next_, end_;
  uint32_t mask_ = 0;
  bool all_;

  __device__ bool touches(int item) const {
    const Common& o = table_.common;
    const Part<T>& p = table_.member_of(item);
    const Tile tile(o, p, item - p.first);
    for (int r = 0; r < o.strata; r++)
      for (int rest = tile.length, start = 0; rest;) {
        const int length = 1 << (31 - __clz(rest));
        if (in_range(column_of(o, p, tile.start + start, r))) return true;
        start += length;
        rest -= length;
      }
    return false;
  }
};

// Adds the blocks of a tile in shared memory to the accumulators, one block after the other: their windows may overlap.
// get(start, v, level): what belongs to column v of the block at `start`.
template <class C, class W, class F>
__device__ void add_blocks(C* acc, int64_t low, const Tile& tile, const Drawn& drawn, const W& walk, const F& get) {
  for (int rest = tile.length, start = 0; rest;) {
    const int level = 31 - __clz(rest), length = 1 << level;
    const int64_t column = drawn.blocks[level].at + start;
    if (walk.in_range(column)) {
      C* to = acc + (column - low);
      for (int v = threadIdx.x; v < length; v += blockDim.x) to[v] = add(to[v], get(start, v, level));
    }
    start += length;
    rest -= length;
    if (rest) __syncthreads();
  }
}

// Of each column the sum of its places, by a warp where there are few columns.
template <class C>
__device__ void fold(const Common& o, const C* acc, C* to) {
  const int lanes = o.dim < o.tile() / 8 ? 32 : 1, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t step = blockDim.x / lanes, rounds = ceil_div(o.dim, step);
  for (int64_t i = 0; i < rounds; i++) {
    const int64_t k = i * step + threadIdx.x / lanes;
    Total<C> sum;
    if (k < o.dim) {
      const int r = o.stratum_of(k);
      const int64_t width = o.width(r), shift = static_cast<int64_t>(r) << o.bits;
      const int64_t end = o.low(r) + shift + width + o.tile();
      for (int64_t at = k + shift + lane * width; at < end; at += lanes * width) sum.add(acc[at]);
    }
    for (int offset = lanes / 2; offset; offset /= 2)
      sum.add({__shfl_down_sync(0xffffffffu, sum.sum, offset), __shfl_down_sync(0xffffffffu, sum.lost, offset)});
    if (k < o.dim && lane == 0) to[k] = sum.value();
  }
}

// sm_120 needs a few registers more for permuted tiles than three blocks leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <class C, int kBits>
constexpr int kPermuted = kTogether<C, 0>;
#else
template <class C, int kBits>
constexpr int kPermuted = kTogether<C, kBits>;
#endif

template <class T, int N, int kBits, bool kHadamard>
__global__ void __launch_bounds__(kThreads, kHadamard ? kTogether<Compute<T>, kBits> : kPermuted<Compute<T>, kBits>)
    tile_sums(const __grid_constant__ Table<Common, Part<T>, N> table, const Sums<Compute<T>> s) {
  using C = Compute<T>;
  WX_DYNAMIC_SHARED(raw);
  __shared__ Block blocks[kMaxBits + 1];
  __shared__ uint32_t in[1 << (kMaxBits - 5)], out[kHadamard ? 1 << (kMaxBits - 5) : 1];
  const Common& o = table.common;
  const Drawn drawn{blocks, in, out};
  const int bits = kBits ? kBits : o.bits, n = (1 << bits) / kPerThread, own = threadIdx.x;
  const Places places(kHadamard ? bits : 0);
  const int group = static_cast<int>(blockIdx.x) / s.ranges, range = static_cast<int>(blockIdx.x) % s.ranges;
  const int row = blockIdx.y;
  C* x = reinterpret_cast<C*>(raw);
  C* slice = s.slice(group, range, row);
  C* acc = s.on_chip ? x + Places::count(bits) : slice;
  const int64_t low = range * s.width;
  for (int64_t i = threadIdx.x; i < s.places; i += blockDim.x) acc[i] = 0;

  Walk<T, N> walk(table, s, group, range);
  Held<T, kPerThread> held;  // of the next tile, under way while this one is worked on; not where registers are short
  const auto load = [&](int item) {
    if (!kBits || item < 0 || own >= n) return;
    const Part<T>& p = table.member_of(item);
    held.load(p, Tile(o, p, item - p.first), row, own, n);
  };
  int item = walk.next();
  load(item);
  while (item >= 0) {
    const Part<T>& p = table.member_of(item);
    const Tile tile(o, p, item - p.first);
    const int next = walk.next();
    for (int r = 0; r < o.strata; r++) {
      draw_tile(o, p, tile, r, true, drawn);
      __syncthreads();
      const C factor = kHadamard ? scaled(p.factor, bits) : p.factor;
      for (int q = own; q < n; q += blockDim.x) {
        if (!kBits || q != own) held.load(p, tile, row, q, n);
#pragma unroll
        for (int k = 0; k < kPerThread; k++) {
          const int j = q + k * n;
          const C by = kHadamard && !tile.full ? scaled(p.factor, j < tile.length ? tile.level(j) : 0) : factor;
          x[places(j)] = flip(mul(widen(held.at[k]), by), (kHadamard ? out : in)[j >> 5], j & 31);
        }
      }
      load(r + 1 < o.strata ? (n > static_cast<int>(blockDim.x) ? item : -1) : next);
      __syncthreads();
      if constexpr (kHadamard) {
        C* to = acc + (tile.full ? blocks[bits].at - low : 0);
        hadamard<kBits>(x, bits, tile.length, [&](C(&v)[kPerThread], int q, int) {
#pragma unroll
          for (int k = 0; k < kPerThread; k++) v[k] = flip(v[k], drawn.sign_in(q + k * n), (q + k * n) & 31);
          if (tile.full) {
#pragma unroll
            for (int k = 0; k < kPerThread; k++) to[q + k * n] = add(to[q + k * n], v[k]);
          } else {
#pragma unroll
            for (int k = 0; k < kPerThread; k++) x[places(q + k * n)] = v[k];
          }
        });
        if (!tile.full) {
          __syncthreads();
          add_blocks(acc, low, tile, drawn, walk, [&](int start, int v, int) { return x[places(start + v)]; });
        }
      } else {
        add_blocks(acc, low, tile, drawn, walk, [&](int start, int v, int level) {
          return x[start + static_cast<int>(blocks[level].permutation.back(v, level))];
        });
      }
      __syncthreads();
    }
    item = next;
  }
  if (!s.on_chip) return;
  if (s.folded) return fold(o, acc, slice);
  for (int64_t i = threadIdx.x; i < s.places; i += blockDim.x) slice[i] = acc[i];
}

// Accumulators that fit beside a tile; float64 gets 4/3 of the bytes.
template <class C>
int64_t sum_room(const Common& o) {
  const int64_t share = int64_t{kSumBytes} * tile_threads(o.bits) / kThreads;
  const int64_t bytes = max(share, int64_t{kSumBytes} / 3) * (sizeof(C) == 8 ? 4 : 3) / 3;
  return min(bytes, int64_t{max_shared_bytes()} - kStaticBytes) / static_cast<int64_t>(sizeof(C)) -
         Places::count(o.bits);
}

// The groups, and what they need of `data`, are counted by a first call without it.
template <class T>
Sums<Compute<T>> launch_tile_sums(const std::vector<Part<T>>& parts, const Common& common, Compute<T>* data,
                                  cudaStream_t stream) {
  using C = Compute<T>;
  const int threads = tile_threads(common.bits);
  Sums<C> sums = Sums<C>::of(common, sum_room<C>(common));
  const int shared = static_cast<int>((Places::count(common.bits) + (sums.on_chip ? sums.places : 0)) * sizeof(C));
  const auto most = [&](int items) { return sums.most_groups(common, items, kSumBlocks * min(3, kThreads / threads)); };
  const auto tiles = [&](const Part<T>& p) { return p.tiles(common.bits); };
  for_each_tile_table(parts, common, tiles, [&](const auto& table, auto) {
    sums.cut(table.items, most(table.items));
    sums.total_groups += sums.groups;
  });
  sums.data = data;
  if (!data) return sums;
  for_each_tile_table(parts, common, tiles, [&](const auto& table, auto bits) {
    constexpr int kN = std::decay_t<decltype(table)>::kMembers, kBits = decltype(bits)::value;
    sums.cut(table.items, most(table.items));
    const auto kernel = common.permuted ? tile_sums<T, kN, kBits, false> : tile_sums<T, kN, kBits, true>;
    allow_shared(kernel, threads, shared);
    WX_LAUNCH_SHARED(kernel, dim3(sums.groups * sums.ranges, common.batch), threads, shared, stream, table, sums);
    sums.first_group += sums.groups;
  });
  return sums;
}

}  // namespace wx::gpu::sub
