// Maps of taps, out = A in, on tiles of 16 filters, for the matrices of all conditions.
//
// A row of an interpolating warp has few numbers that are not zero (bilinear: at most four): where every row has, the
// zeros are left out, which changes no bit of a finite result. Both forms add the terms of a row in their order.
#pragma once
#include <vector>

#include "tile.h"

namespace wx::fw {

constexpr int kRows = 9;  // sums in registers: 9 of AVX2's 16, and all of a 3 x 3 kernel
constexpr int kFew = 9;   // numbers of a row in registers

template <class C>
struct Term {
  C value;
  int32_t at;
};

// out [tiles][n][16] = (out +) A in [tiles][m][16]; `matrix` has groups of rows, column by column.
template <class C, bool Add>
struct DenseMap {
  template <int Bytes, int R>
  WX_INLINE static void rows(const C* matrix, int64_t n, int64_t m, const C* in, int64_t tiles, C* out) {
    using V = typename Packs<C, Bytes>::F;
    constexpr int N = Packs<C, Bytes>::N;
    for (int64_t t = 0; t < tiles; t++, in += m * kFilters, out += n * kFilters)
      for (int part = 0; part < kFilters; part += N) {
        V sum[R] = {}, x, y;
        for (int64_t j = 0; j < m; j++) {
          get(x, in + j * kFilters + part);
#pragma GCC unroll 9
          for (int r = 0; r < R; r++) {
            y = matrix[j * R + r] - V{};  // + would turn -0 into 0, so it would not be left out
            fma<Bytes>(sum[r], y, x);
          }
        }
#pragma GCC unroll 9
        for (int r = 0; r < R; r++) {
          if constexpr (Add) {
            get(y, out + r * kFilters + part);
            sum[r] = sum[r] + y;
          }
          put(out + r * kFilters + part, sum[r]);
        }
      }
  }

  template <int Bytes>
  WX_INLINE static void body(const C* matrix, int64_t n, int64_t m, const C* in, int64_t tiles, C* out) {
    in_groups<kRows>(n, [&](int64_t size, int64_t first) WX_ALWAYS {
      with_size<kRows>(size, [&](auto here) WX_ALWAYS {
        rows<Bytes, here.value>(matrix + first * m, n, m, in, tiles, out + first * kFilters);
      });
    });
  }
};

// The same from the terms of each row.
template <class C, bool Add>
struct SparseMap {
  template <int Bytes, int Count>
  WX_INLINE static void row(const Term<C>* terms, int64_t n, int64_t m, const C* in, int64_t tiles, C* out) {
    using V = typename Packs<C, Bytes>::F;
    C factor[Count];
    const C* from[Count];
#pragma GCC unroll 9
    for (int i = 0; i < Count; i++) {
      factor[i] = terms[i].value;
      from[i] = in + terms[i].at * kFilters;
    }
    for (int64_t t = 0; t < tiles; t++)
      for (int part = 0; part < kFilters; part += Packs<C, Bytes>::N) {
        V sum{}, x, y;
#pragma GCC unroll 9
        for (int i = 0; i < Count; i++) {
          get(x, from[i] + t * m * kFilters + part);
          y = factor[i] - V{};
          fma<Bytes>(sum, y, x);
        }
        C* to = out + t * n * kFilters + part;
        if constexpr (Add) {
          get(x, to);
          sum = sum + x;
        }
        put(to, sum);
      }
  }

  template <int Bytes>
  WX_INLINE static void body(const Term<C>* terms, const int32_t* counts, int64_t n, int64_t m, const C* in,
                             int64_t tiles, C* out) {
    for (int64_t i = 0; i < n; terms += counts[i], i++, out += kFilters) {
      if (counts[i] > 0)
        with_size<kFew>(counts[i], [&](auto count) WX_ALWAYS { row<Bytes, count.value>(terms, n, m, in, tiles, out); });
      else if (!Add)
        for (int64_t t = 0; t < tiles; t++)
          for (int l = 0; l < kFilters; l++) out[t * n * kFilters + l] = 0;
    }
  }
};

template <class C>
class Maps {
 public:
  // f(b, i, j): the number of matrix b in row i of n, column j of m.
  template <class Parallel, class F>
  Maps(const Parallel& parallel, int64_t batch, int64_t n, int64_t m, const F& f)
      : n_(n), m_(m), dense_(batch), dense_packed_(batch * n * m), terms_(batch * n * m), counts_(batch * n) {
    parallel(batch, [&](int64_t b) {
      const auto at = [&](int64_t i, int64_t j) { return f(b, i, j); };
      Term<C>* terms = terms_.data() + b * n * m;
      int64_t all = 0, most = 0;
      for (int64_t i = 0; i < n; i++) {
        const int64_t before = all;
        for (int64_t j = 0; j < m; j++)
          if (const C value = at(i, j); value != 0) terms[all++] = {value, static_cast<int32_t>(j)};
        counts_.data()[b * n + i] = static_cast<int32_t>(all - before);
        most = std::max(most, all - before);
      }
      dense_[b] = most > kFew || all > n * m / 2;
      if (dense_[b]) pack(at, dense_packed_.data() + b * n * m);
    });
  }

  template <bool Add>
  void apply(int64_t b, const C* in, int64_t tiles, C* out) const {
    const int64_t first = b * n_ * m_;
    if (dense_[b])
      run<DenseMap<C, Add>>(dense_packed_.as_const() + first, n_, m_, in, tiles, out);
    else
      run<SparseMap<C, Add>>(terms_.as_const() + first, counts_.as_const() + b * n_, n_, m_, in, tiles, out);
  }

 private:
  template <class At>
  void pack(const At& at, C* packed) const {
    in_groups<kRows>(n_, [&](int64_t rows, int64_t first) {
      for (int64_t j = 0; j < m_; j++)
        for (int64_t r = 0; r < rows; r++) *packed++ = at(first + r, j);
    });
  }

  int64_t n_, m_;
  std::vector<char> dense_;  // not bool: threads write
  Lines<C> dense_packed_;
  Lines<Term<C>> terms_;
  Lines<int32_t> counts_;
};

}  // namespace wx::fw
