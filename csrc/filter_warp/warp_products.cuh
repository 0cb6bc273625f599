// Any number of banks and taps, as two kinds of matrix product, in tiles.
//
//   out, dweight   y[i, f, r] = sum over j, s of  m[i, j, r, s] x[j, f, s]
//   da             a Gram matrix for each condition and bank, summed over the filters
#pragma once
#include "cut.cuh"

namespace wx::gpu::fw {

constexpr int kTileThreads = 128;
constexpr int kTileRows = 32;     // (i, r), or (b, p)
constexpr int kTileFilters = 64;  // of a map
constexpr int kDepth = 16;        // numbers of (j, s) at a time
constexpr int kGramColumns = 32;  // (e, q)
constexpr int kGramDepth = 32;    // filters at a time

// What a map reads and writes; `of_j` and so on are the strides of m.
struct Map {
  int64_t filters;
  int taps, ins, outs;
  int64_t of_i, of_j, of_r, of_s;

  __host__ static Map forward(const Sizes& o) {
    return {o.filters, o.taps, o.banks, o.batch, o.banks * o.matrix(), o.matrix(), o.taps, 1};
  }
  __host__ static Map backward(const Sizes& o) {
    return {o.filters, o.taps, o.batch, o.banks, o.matrix(), o.banks * o.matrix(), 1, o.taps};
  }
  __host__ __device__ int64_t rows() const { return int64_t{outs} * taps; }
  __host__ __device__ int64_t depth() const { return int64_t{ins} * taps; }
  __host__ __device__ int64_t row_tiles() const { return ceil_div<int64_t>(rows(), kTileRows); }
  __host__ int64_t filter_tiles() const { return ceil_div<int64_t>(filters, kTileFilters); }
};

template <class C>
__global__ void __launch_bounds__(kTileThreads, 4) map_filters(const Input x, const C* m, const Output y, const Map o) {
  constexpr int R = 4, F = 4, kRowStep = kTileRows / R, kFilterStep = kTileFilters / F, kLoad = kTileThreads / kDepth;
  __shared__ C ms[kDepth][kTileRows + 1], xs[kDepth][kTileFilters + 1];
  const int64_t tile = divide(blockIdx.x, o.row_tiles());
  const int64_t first_row = (blockIdx.x - tile * o.row_tiles()) * kTileRows, first = tile * kTileFilters;
  const int own_row = threadIdx.x % kRowStep, own_filter = threadIdx.x / kRowStep;
  const int k = threadIdx.x % kDepth, load = threadIdx.x / kDepth;  // what it loads
  int64_t rows[kTileRows / kLoad];
#pragma unroll
  for (int u = 0; u < kTileRows / kLoad; u++) {
    const int64_t row = first_row + load + u * kLoad, i = divide(row, o.taps);
    rows[u] = row < o.rows() ? i * o.of_i + (row - i * o.taps) * o.of_r : -1;
  }
  C sum[R][F] = {};
  for (int64_t begin = 0; begin < o.depth(); begin += kDepth) {
    const int64_t at = begin + k, j = divide(at, o.taps), s = at - j * o.taps;
    const bool inside = at < o.depth();
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kTileRows / kLoad; u++)
      ms[k][load + u * kLoad] = inside && rows[u] >= 0 ? m[rows[u] + j * o.of_j + s * o.of_s] : C(0);
    x.read([&](const auto* from) {
#pragma unroll
      for (int u = 0; u < kTileFilters / kLoad; u++) {
        const int64_t f = first + load + u * kLoad;
        xs[k][load + u * kLoad] =
            inside && f < o.filters ? static_cast<C>(widen(from[(j * o.filters + f) * o.taps + s])) : C(0);
      }
    });
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; d++) {
      C row[R], filter[F];
#pragma unroll
      for (int u = 0; u < R; u++) row[u] = ms[d][own_row + u * kRowStep];
#pragma unroll
      for (int v = 0; v < F; v++) filter[v] = xs[d][own_filter + v * kFilterStep];
#pragma unroll
      for (int u = 0; u < R; u++)
#pragma unroll
        for (int v = 0; v < F; v++) sum[u][v] += row[u] * filter[v];
    }
  }
  y.write([&](auto* to) {
#pragma unroll
    for (int u = 0; u < R; u++) {
      const int64_t row = first_row + own_row + u * kRowStep, i = divide(row, o.taps), r = row - i * o.taps;
#pragma unroll
      for (int v = 0; v < F; v++) {
        const int64_t f = first + own_filter + v * kFilterStep;
        if (row < o.rows() && f < o.filters) narrow(sum[u][v], to[(i * o.filters + f) * o.taps + r]);
      }
    }
  });
}

template <class C>
void launch_map_filters(const Input& x, const C* m, const Output& y, const Map& o, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(o.row_tiles() * o.filter_tiles());
  WX_LAUNCH(map_filters<C>, blocks, kTileThreads, stream, x, m, y, o);
}

// Where column (x, tap) of [.., filters, taps] begins, -1 past the last.
__device__ inline int64_t column_of(int64_t column, int64_t count, int64_t filters, int taps) {
  const int64_t x = divide(column, taps);
  return column < count ? x * filters * taps + column - x * taps : -1;
}

// parts [groups][batch][banks][taps][taps]. A block has a tile of rows (b, p) and columns (e, q), and a group of
// filters.
template <class C>
__global__ void __launch_bounds__(kTileThreads, 4)
    gram_filters(const Input grad, const Input weight, C* parts, const Sizes o, const Groups groups) {
  constexpr int R = 4, Q = 2, kRowStep = kTileRows / R, kColumnStep = kGramColumns / Q, kLoad = kTileThreads / 32;
  static_assert(kTileRows == 32 && kGramColumns == 32);  // a warp loads one filter
  __shared__ C gs[kGramDepth][kTileRows + 1], ws[kGramDepth][kGramColumns + 1];
  const int64_t rows = int64_t{o.batch} * o.taps, columns = int64_t{o.banks} * o.taps;
  const int64_t first_column =
      static_cast<int64_t>(blockIdx.x) % ceil_div<int64_t>(columns, kGramColumns) * kGramColumns;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) / ceil_div<int64_t>(columns, kGramColumns) * kTileRows;
  const int own_row = threadIdx.x % kRowStep, own_column = threadIdx.x / kRowStep;
  const int k = threadIdx.x % 32, load = threadIdx.x / 32;
  const int64_t from_row = column_of(first_row + k, rows, o.filters, o.taps);
  const int64_t from_column = column_of(first_column + k, columns, o.filters, o.taps);
  C total[R][Q] = {};
  for (int64_t tile = groups.begin(blockIdx.y); tile < groups.end(blockIdx.y); tile++) {
    __syncthreads();
    const auto stage = [&](const auto* from, int64_t column, C(*to)[33]) {
#pragma unroll
      for (int u = 0; u < kGramDepth / kLoad; u++) {
        const int64_t f = tile * kGramDepth + load + u * kLoad;
        to[load + u * kLoad][k] =
            column >= 0 && f < o.filters ? static_cast<C>(widen(from[column + f * o.taps])) : C(0);
      }
    };
    grad.read([&](const auto* from) { stage(from, from_row, gs); });
    weight.read([&](const auto* from) { stage(from, from_column, ws); });
    __syncthreads();
    C sum[R][Q] = {};
#pragma unroll 8
    for (int d = 0; d < kGramDepth; d++)
#pragma unroll
      for (int u = 0; u < R; u++)
#pragma unroll
        for (int v = 0; v < Q; v++) sum[u][v] += gs[d][own_row + u * kRowStep] * ws[d][own_column + v * kColumnStep];
#pragma unroll
    for (int u = 0; u < R; u++)
#pragma unroll
      for (int v = 0; v < Q; v++) total[u][v] += sum[u][v];
  }
  C* to = parts + blockIdx.y * o.matrices();
#pragma unroll
  for (int u = 0; u < R; u++)
#pragma unroll
    for (int v = 0; v < Q; v++) {
      const int64_t row = first_row + own_row + u * kRowStep, column = first_column + own_column + v * kColumnStep;
      const int64_t b = divide(row, o.taps), p = row - b * o.taps, e = divide(column, o.taps), q = column - e * o.taps;
      if (row < rows && column < columns) to[((b * o.banks + e) * o.taps + p) * o.taps + q] = total[u][v];
    }
}

// Of all Gram matrices.
inline int64_t gram_tiles(const Sizes& o) {
  return ceil_div<int64_t>(int64_t{o.batch} * o.taps, kTileRows) *
         ceil_div<int64_t>(int64_t{o.banks} * o.taps, kGramColumns);
}

// Groups of filters: many for small matrices, few where the parts would be as large as G.
inline Groups gram_groups(const Sizes& o) {
  const int64_t most = min(o.filters / (int64_t{4} * o.banks * o.taps) + 1, ceil_div(kWantedBlocks, gram_tiles(o)));
  return Groups::of(o.filters, kGramDepth, static_cast<int>(min(most, int64_t{kMostGroups})));
}

template <class C>
void launch_gram_filters(const Input& grad, const Input& weight, C* parts, const Sizes& o, cudaStream_t stream) {
  const Groups groups = gram_groups(o);
  const dim3 grid(static_cast<unsigned>(gram_tiles(o)), groups.count);
  WX_LAUNCH(gram_filters<C>, grid, kTileThreads, stream, grad, weight, parts, o, groups);
}

}  // namespace wx::gpu::fw
