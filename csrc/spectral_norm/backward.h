// One weight's backward on the CPU; reference.py has the maths, rows.h the passes, layout.h the words.
#pragma once
#include <optional>
#include <vector>

#include "../common/layout.h"
#include "rows.h"
#include "scale.h"

namespace wx::sn {

// One weight's backward.
template <class G, class T>
struct Backward {
  using C = Compute<T>;

  const G* g;
  const T* w;
  T* dw;
  Layout layout;
  const C* state;
  double gain;
  std::optional<double> bound;
  C* dgain;
  bool past_cache;
  bool add;  // to what is in dw

  int64_t bytes() const { return layout.numel() * static_cast<int64_t>(sizeof(T)); }

  template <class Parallel>
  void run(const Parallel& parallel) {
    const int64_t h = layout.swapped ? layout.n : layout.m, width = layout.swapped ? layout.m : layout.a * layout.n;
    std::vector<double> parts(layout.blocks);
    parallel(layout.blocks, [&](int64_t k) {
      const int64_t at = layout.first_row(k) * layout.n;
      parts[k] = inner(g + at, w + at, layout.rows(k) * layout.n);
    });
    double radial = 0;
    for (double p : parts) radial += p;
    const Scale scale(static_cast<double>(state[h + width]), bound);
    *dgain = static_cast<C>(scale.s * radial);
    const C p = static_cast<C>(gain * scale.s), q = static_cast<C>(gain * scale.ds * radial);

    std::vector<C> v(width);  // in the order of memory
    for (int64_t i = 0; i < width; i++) v[i] = state[h + (layout.column.empty() ? i : layout.column[i])];
    const C* rows = layout.swapped ? v.data() : state;
    const C* columns = layout.swapped ? state : v.data();
    parallel(layout.blocks, [&](int64_t i) {
      const int64_t k = layout.blocks - 1 - i, first = layout.first_row(k);
      for (int64_t r = first + layout.rows(k) - 1; r >= first; r--) {
        const int64_t slab = r / layout.m, row = r % layout.m, at = r * layout.n;
        update(g + at, columns + slab * layout.n, dw + at, layout.n, p, q * rows[row], past_cache, add);
      }
      stream_fence();
    });
  }
};

}  // namespace wx::sn
