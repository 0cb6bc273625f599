// What the passes over tiles share. A tile is 16 filters, tap by tap; all that a pass reads is in L1 or L2.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../common/pool.h"
#include "../common/simd.h"

namespace wx::fw {

constexpr int kFilters = 16;  // of a tile, whatever the width of vectors

// n in as few groups of at most `Most` as there may be, of nearly equal size: f(size, first).
template <int Most, class F>
WX_INLINE void in_groups(int64_t n, const F& f) {
  const int64_t groups = (n + Most - 1) / Most;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = g * n / groups;
    f((g + 1) * n / groups - first, first);
  }
}

// f of `size`, from 1 to Most, as a constant.
template <int Most, class F>
WX_INLINE void with_size(int64_t size, const F& f) {
  if constexpr (Most > 1) {
    if (size < Most) return with_size<Most - 1>(size, f);
  }
  f(std::integral_constant<int, Most>());
}

// Uninitialised numbers at the start of a cache line.
template <class C>
class Lines {
 public:
  explicit Lines(int64_t n) : held_(n == 0 ? 0 : n + 64 / static_cast<int64_t>(sizeof(C))) {
    const auto at = reinterpret_cast<uintptr_t>(held_.data());
    data_ = held_.data() ? held_.data() + (64 - at % 64) % 64 / sizeof(C) : nullptr;
  }
  C* data() const { return data_; }
  const C* as_const() const { return data_; }

 private:
  Scratch<C> held_;
  C* data_;
};

}  // namespace wx::fw
