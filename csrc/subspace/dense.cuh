// theta = theta0 + E z with a stored E [D, d]: E is read once, forward and backward. To tolerance.
#pragma once
#include "../common/formats.cuh"
#include "sums.cuh"

namespace wx::gpu::sub {

constexpr int kDenseRows = 256;  // of E, for a block

// The elements of a tensor, and the row of E where it begins.
struct DensePart {
  const void* from;  // theta0, or a gradient
  void* to;
  int64_t count, row;
  Format format;
  bool same;
  int first;

  __host__ int64_t tiles() const { return ceil_div<int64_t>(count, kDenseRows); }
};

struct DenseCommon {
  const void* basis;
  int64_t dim;
  int batch;
  int lane_bits;  // 2^lane_bits threads share a row; backward: are side by side
  bool wide;      // rows of E and of z begin on 16 bytes

  __host__ __device__ int lanes() const { return 1 << lane_bits; }
  __host__ __device__ int rows() const { return kThreads >> lane_bits; }  // at once
};

// W numbers side by side.
template <class C, int W, class E>
__device__ void load_wide(const E* from, C (&to)[W]) {
  const Pack<E, W> pack = *reinterpret_cast<const Pack<E, W>*>(from);
#pragma unroll
  for (int i = 0; i < W; i++) to[i] = static_cast<C>(widen(pack.at[i]));
}

template <class E>
constexpr int kWide = 16 / static_cast<int>(sizeof(E));

template <int W, int K, class E, class C>
__device__ void add_products(const E* e, const C* z, const DenseCommon& o, int row, int lane, C (&sum)[K]) {
#pragma unroll(K == 1 ? 4 : 1)
  for (int64_t j = W * lane; j < o.dim; j += W * o.lanes()) {
    C a[W];
    load_wide<C, W>(e + j, a);
#pragma unroll
    for (int b = 0; b < K; b++) {
      if (row + b >= o.batch) continue;
      const C* with = z + (row + b) * o.dim + j;
#pragma unroll
      for (int i = 0; i < W; i++) sum[b] += a[i] * with[i];
    }
  }
}

// 2^lane_bits threads share a row of E, K of the batch share its reading.
template <class E, class C, int K>
__global__ void __launch_bounds__(kThreads, 2)
    dense(const __grid_constant__ Table<DenseCommon, DensePart, kSomeMembers> table, const C* z) {
  const DenseCommon& o = table.common;
  const DensePart& p = table.member_of(blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - p.first) * kDenseRows;
  const int n = static_cast<int>(min(p.count - begin, int64_t{kDenseRows}));
  const int lane = static_cast<int>(threadIdx.x) & (o.lanes() - 1), step = o.rows();
  for (int from = 0; from < n; from += step) {
    const int i = from + (static_cast<int>(threadIdx.x) >> o.lane_bits);
    const E* e = static_cast<const E*>(o.basis) + (p.row + begin + min(i, n - 1)) * o.dim;
    const C theta0 = load<C>(p.from, p.format, p.same ? 0 : begin + min(i, n - 1));
    for (int row = 0; row < o.batch; row += K) {
      C sum[K] = {};
      if (o.wide)
        add_products<kWide<E>>(e, z, o, row, lane, sum);
      else
        add_products<1>(e, z, o, row, lane, sum);
#pragma unroll
      for (int b = 0; b < K; b++) {
        for (int offset = o.lanes() / 2; offset; offset /= 2) sum[b] += __shfl_xor_sync(0xffffffffu, sum[b], offset);
        if (lane == 0 && i < n && row + b < o.batch)
          store(p.to, p.format, (row + b) * p.count + begin + i, theta0 + sum[b]);
      }
    }
  }
}

// 2^lane_bits threads have W columns each, side by side, and o.rows() rows are under way.
template <class E, class C, int W>
__global__ void __launch_bounds__(kThreads, 2)
    dense_sums(const __grid_constant__ Table<DenseCommon, DensePart, kSomeMembers> table, const Sums<C> s) {
  constexpr int kAtOnce = 8;  // rows summed in C before float64 takes over
  __shared__ C g[kDenseRows];
  __shared__ Total<C> parts[kThreads];
  const DenseCommon& o = table.common;
  const int lane = static_cast<int>(threadIdx.x) & (o.lanes() - 1), own = static_cast<int>(threadIdx.x) >> o.lane_bits;
  const int step = o.rows();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * o.lanes() + lane) * W, row = blockIdx.z;
  const E* basis = static_cast<const E*>(o.basis) + column;
  Total<C> total[W];
  const int begin_item = static_cast<int>(blockIdx.y) * s.tiles, end = min(table.items, begin_item + s.tiles);
  for (int item = begin_item; item < end; item++) {
    const DensePart& p = table.member_of(item);
    const int64_t begin = static_cast<int64_t>(item - p.first) * kDenseRows;
    const int n = static_cast<int>(min(p.count - begin, int64_t{kDenseRows}));
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads)
      g[i] = load<C>(p.from, p.format, p.same ? 0 : row * p.count + begin + i);
    __syncthreads();
    for (int from = column < o.dim ? own : n; from < n; from += kAtOnce * step) {
      C sum[W] = {};
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        const int i = from + k * step;
        if (i >= n) continue;
        C e[W];
        load_wide<C, W>(basis + (p.row + begin + i) * o.dim, e);
#pragma unroll
        for (int w = 0; w < W; w++) sum[w] += g[i] * e[w];
      }
#pragma unroll
      for (int w = 0; w < W; w++) total[w].add(static_cast<double>(sum[w]));
    }
  }
#pragma unroll
  for (int w = 0; w < W; w++) {
    __syncthreads();
    parts[threadIdx.x] = total[w];
    __syncthreads();
    if (own == 0 && column < o.dim) {
#pragma unroll 1
      for (int k = 1; k < step; k++) total[w].add(parts[k * o.lanes() + lane]);
      s.slice(blockIdx.y, 0, row)[column + w] = total[w].value();
    }
  }
}

// The power of two of threads for so many columns.
inline int lane_bits_for(int64_t columns, int most) {
  int bits = 0;
  while (1 << bits < most && 1 << bits < columns) bits++;
  return bits;
}

template <class E, class C>
void launch_dense(const std::vector<DensePart>& parts, DenseCommon common, const C* z, cudaStream_t stream) {
  common.lane_bits = lane_bits_for(ceil_div<int64_t>(common.dim, kWide<E>), 32);
  const auto tiles = [](const DensePart& p) { return p.tiles(); };
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    const auto kernel = common.batch == 1 ? dense<E, C, 1> : dense<E, C, 4>;
    WX_LAUNCH(kernel, table.items, kThreads, stream, table, z);
  });
}

template <class E, class C>
Sums<C> launch_dense_sums(const std::vector<DensePart>& parts, DenseCommon common, C* data, cudaStream_t stream) {
  const int width = common.wide ? kWide<E> : 1;
  common.lane_bits = lane_bits_for(ceil_div<int64_t>(common.dim, width), kThreads);
  const auto columns = static_cast<unsigned>(ceil_div<int64_t>(common.dim, int64_t{width} << common.lane_bits));
  auto sums = Sums<C>::of_columns(common.dim, data);
  const auto tiles = [](const DensePart& p) { return p.tiles(); };
  const int most = most_column_groups(common.dim);
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    sums.cut(table.items, most);
    sums.total_groups += sums.groups;
  });
  if (!data) return sums;
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    sums.cut(table.items, most);
    const auto kernel = common.wide ? dense_sums<E, C, kWide<E>> : dense_sums<E, C, 1>;
    WX_LAUNCH(kernel, dim3(columns, sums.groups, common.batch), kThreads, stream, table, sums);
    sums.first_group += sums.groups;
  });
  return sums;
}

}  // namespace wx::gpu::sub
