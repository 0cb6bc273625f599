// Where the matrix of a weight lies in memory.
#pragma once
#include <algorithm>
#include <vector>

#include "cut.cuh"

namespace wx::gpu::sn {

// A dense weight is [a, m, b] in memory, dim being m; the transposed matrix where that has the longer lines (b = 1).
// v is in logical order. In memory its axes may be turned (channels_last): columns are then [columns / inner, inner],
// and v is [inner, columns / inner].
struct Layout {
  int64_t a = 1, m = 1, b = 1, inner = 0;
  bool swapped = false;    // u belongs to the columns
  bool supported = false;  // else: a contiguous copy

  Layout(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t dim) {
    std::vector<int64_t> axes;  // from the slowest to the fastest
    for (size_t i = 0; i < sizes.size(); i++)
      if (sizes[i] != 1) axes.push_back(static_cast<int64_t>(i));
    std::stable_sort(axes.begin(), axes.end(), [&](int64_t i, int64_t j) { return strides[i] > strides[j]; });
    m = sizes[dim];
    int64_t expected = 1;
    bool dense = true, before = std::find(axes.begin(), axes.end(), dim) != axes.end();
    for (size_t i = axes.size(); i-- > 0; expected *= sizes[axes[i]]) dense = dense && strides[axes[i]] == expected;
    std::vector<int64_t> rest;
    for (const int64_t axis : axes) {
      if (axis == dim) {
        before = false;
      } else {
        (before ? a : b) *= sizes[axis];
        rest.push_back(axis);
      }
    }
    supported = dense && (std::is_sorted(rest.begin(), rest.end()) || turned(rest, sizes));
    if (b == 1) {
      swapped = true;
      b = m;
      m = a;
      a = 1;
    }
  }

 private:
  // The axes that are first in memory are last in v.
  bool turned(const std::vector<int64_t>& rest, const std::vector<int64_t>& sizes) {
    const auto second = std::is_sorted_until(rest.begin(), rest.end());
    if (a != 1 || b == 1 || b > INT32_MAX || !std::is_sorted(second, rest.end()) || rest.back() > rest.front())
      return false;
    inner = 1;
    for (auto axis = second; axis != rest.end(); ++axis) inner *= sizes[*axis];
    return true;
  }
};

}  // namespace wx::gpu::sn
