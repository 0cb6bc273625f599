// Where the matrix of a weight lies in memory, and how it is cut into blocks.
#pragma once
#include <algorithm>
#include <vector>

#include "dense.h"

namespace wx {

constexpr int64_t kBlockBytes = 256 << 10;  // of the weight, at the least
constexpr int64_t kMaxBlocks = 64;          // per weight: bounds the partial sums
constexpr int64_t kPastCache = 8 << 20;     // outputs of a call from which stores go past the cache

// A weight is a stack of slabs [a, m, b] in memory: `a` axes before dim, m = the size of dim, `b` after it.
struct Layout {
  int64_t a = 1, m = 1, b = 1;                     // slabs, rows, row length
  bool swapped = false;                            // stored as the transposed matrix: u and v change places
  std::vector<int64_t> column;                     // memory position -> index in v; empty where they are the same
  int64_t n, units, unit_rows, blocks, per_block;  // a block is per_block units: rows of n numbers, or slabs of m rows

  Layout(const Tensor& weight, int64_t dim) {
    const Dims sizes = to_dims(weight.sizes()), order = memory_order(sizes, to_dims(weight.strides()));
    const auto at = std::find(order.begin(), order.end(), dim) - order.begin();
    m = sizes[dim];
    Dims rest;
    for (int64_t i = 0; i < static_cast<int64_t>(order.size()); i++) {
      if (i == at) continue;
      (i < at ? a : b) *= sizes[order[i]];
      rest.push_back(order[i]);
    }
    map_columns(sizes, rest, dim);
    if (b == 1 && a > 1) {
      swapped = true;
      b = m;  // a rows of m numbers
      m = a;
      a = 1;
    }
    n = b;
    units = a == 1 ? m : a;
    unit_rows = a == 1 ? 1 : m;
    const int64_t unit_bytes = std::max<int64_t>(1, unit_rows * n * itemsize(weight.scalar_type()));
    const int64_t wanted = std::max(kBlockBytes / unit_bytes, (units + kMaxBlocks - 1) / kMaxBlocks);
    per_block = std::max<int64_t>(4, (wanted + 3) / 4 * 4);
    if (a > 1) per_block = std::max<int64_t>(1, wanted);
    blocks = (units + per_block - 1) / per_block;
  }

  int64_t numel() const { return a * m * n; }
  int64_t count(int64_t block) const { return std::min(per_block, units - block * per_block); }
  int64_t rows(int64_t block) const { return count(block) * unit_rows; }
  int64_t first_row(int64_t block) const { return block * per_block * unit_rows; }

 private:
  void map_columns(const Dims& sizes, const Dims& rest, int64_t dim) {
    Dims moving;
    for (int64_t i : rest)
      if (sizes[i] != 1) moving.push_back(i);
    if (std::is_sorted(moving.begin(), moving.end())) return;
    Dims step(sizes.size());  // of an axis in v, whose axes are in logical order
    int64_t total = 1;
    for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; i--)
      if (i != dim) step[i] = total, total *= sizes[i];
    column.assign(total, 0);
    int64_t inner = total;
    for (int64_t i : rest) {
      inner /= sizes[i];
      for (int64_t p = 0; p < total; p++) column[p] += p / inner % sizes[i] * step[i];
    }
  }
};

}  // namespace wx
