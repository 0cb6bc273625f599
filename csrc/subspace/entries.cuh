// rademacher and gaussian: every entry of P is drawn. Sums over columns are in order, in registers; nothing is shared
// but the draws.
#pragma once
#include "sums.cuh"

namespace wx::gpu::sub {

constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

constexpr int kEntryBits = log2_of(kThreads) + 2;  // rows of a block: a thread has four
constexpr int kShortSum = 16;                      // numbers summed in dt before float64 takes over

// A warp has 128 rows, which one draw has a sign for; of coins a draw has four. K of the batch share the draws.
template <class T, bool kCoins, int K>
__global__ void __launch_bounds__(kThreads)
    entries(const __grid_constant__ Table<Common, Part<T>, kSomeMembers> table, const Compute<T>* z) {
  using C = Compute<T>;
  __shared__ Words words[kThreads];
  const Common& o = table.common;
  const Part<T>& p = table.member_of(blockIdx.x);
  const Tile tile(o, p, blockIdx.x - p.first);
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) - lane;
  const int64_t pos = (tile.start + 4 * first) >> 7;
  const uint32_t step = step_of(o.step);
  for (int row = 0; row < o.batch; row += K) {
    C acc[K][4] = {};
    const auto add_column = [&](const Words& w, int64_t j) {
#pragma unroll
      for (int b = 0; b < K; b++) {
        if (row + b >= o.batch) continue;
        const C value = z[(row + b) * o.dim + j];
#pragma unroll
        for (int q = 0; q < 4; q++)
          acc[b][q] = add(acc[b][q], kCoins ? mul(C(coins(w.at[q])), value) : flip(value, w.at[q], lane));
      }
    };
    for (int64_t begin = 0; begin < o.dim; begin += 32) {
      const int n = static_cast<int>(min(o.dim - begin, int64_t{32}));
      if constexpr (kCoins) {
        for (int j = 0; j < n; j++) add_column(draw(p.key, kEntry, 32 * pos + lane, begin + j, step), begin + j);
      } else {
        __syncwarp();
        if (lane < n) words[threadIdx.x] = draw(p.key, kEntry, pos, begin + lane, step);
        __syncwarp();
        for (int j = 0; j < n; j++) add_column(words[first + j], begin + j);
      }
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int i = 4 * first + (kCoins ? 4 * lane + q : 32 * q + lane);
      if (!tile.has(i)) continue;
      const C theta0 = widen(p.from[p.same ? 0 : tile.at + i]);
#pragma unroll
      for (int b = 0; b < K; b++)
        if (row + b < o.batch) narrow(add(theta0, mul(acc[b][q], p.factor)), p.to[(row + b) * p.count + tile.at + i]);
    }
  }
}

// A thread has a column; of g all threads read the same number at once.
template <class T, bool kCoins>
__global__ void __launch_bounds__(kThreads)
    entry_sums(const __grid_constant__ Table<Common, Part<T>, kSomeMembers> table, const Sums<Compute<T>> s) {
  using C = Compute<T>;
  __shared__ C g[1 << kEntryBits];
  const Common& o = table.common;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = blockIdx.z;
  const uint32_t step = step_of(o.step);
  Total<C> total;
  const int begin_item = static_cast<int>(blockIdx.y) * s.tiles, end = min(table.items, begin_item + s.tiles);
  for (int item = begin_item; item < end; item++) {
    const Part<T>& p = table.member_of(item);
    const Tile tile(o, p, item - p.first);
    __syncthreads();
    for (int i = threadIdx.x; i < o.tile(); i += blockDim.x)
      g[i] = tile.has(i) ? mul(widen(p.from[p.same ? 0 : row * p.count + tile.at + i]), p.factor) : C(0);
    __syncthreads();
    if (column >= o.dim) continue;
    constexpr int kOfDraw = kCoins ? 1 : 32;  // rows that a word is for
    for (int i = 0; i < tile.length; i += 4 * kOfDraw) {
      const Words w = draw(p.key, kEntry, (tile.start + i) / (4 * kOfDraw), static_cast<uint32_t>(column), step);
#pragma unroll
      for (int q = 0; q < 4; q += kCoins ? 4 : 1) {
#pragma unroll
        for (int from = 0; from < kOfDraw; from += kShortSum) {
          C sum = 0;
#pragma unroll
          for (int k = 0; k < (kCoins ? 4 : kShortSum); k++)
            sum += kCoins ? C(coins(w.at[k % 4])) * g[i + k] : flip(g[i + 32 * q + from + k], w.at[q], from + k);
          total.add(static_cast<double>(sum));
        }
      }
    }
  }
  if (column < o.dim) s.slice(blockIdx.y, 0, row)[column] = total.value();
}

template <class T>
void launch_entries(const std::vector<Part<T>>& parts, Common common, bool coins, const Compute<T>* z,
                    cudaStream_t stream) {
  common.bits = kEntryBits;
  const auto tiles = [](const Part<T>& p) { return p.tiles(kEntryBits); };
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    const auto kernel = common.batch == 1 ? (coins ? entries<T, true, 1> : entries<T, false, 1>)
                                          : (coins ? entries<T, true, 4> : entries<T, false, 4>);
    WX_LAUNCH(kernel, table.items, kThreads, stream, table, z);
  });
}

template <class T>
Sums<Compute<T>> launch_entry_sums(const std::vector<Part<T>>& parts, Common common, bool coins, Compute<T>* data,
                                   cudaStream_t stream) {
  common.bits = kEntryBits;
  const int threads = static_cast<int>(min(int64_t{kThreads}, ceil_div<int64_t>(common.dim, 32) * 32));
  const auto columns = static_cast<unsigned>(ceil_div<int64_t>(common.dim, threads));
  auto sums = Sums<Compute<T>>::of_columns(common.dim, data);
  const auto tiles = [](const Part<T>& p) { return p.tiles(kEntryBits); };
  const int most = most_column_groups(common.dim);
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    sums.cut(table.items, most);
    sums.total_groups += sums.groups;
  });
  if (!data) return sums;
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    sums.cut(table.items, most);
    const auto kernel = coins ? entry_sums<T, true> : entry_sums<T, false>;
    WX_LAUNCH(kernel, dim3(columns, sums.groups, common.batch), threads, stream, table, sums);
    sums.first_group += sums.groups;
  });
  return sums;
}

}  // namespace wx::gpu::sub
