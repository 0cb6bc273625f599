// What is computed on tiles of 16 filters that lie tap by tap: maps of taps, and Gram matrices. All that they read is
// in L1 and L2; a number of a matrix meets 16 filters at once.
#pragma once
#include <vector>

#include "transpose.h"

namespace wx::fw {

// n in as few groups of at most `Most` as there may be, of nearly equal size: f(size, first).
template <int Most, class F>
WX_INLINE void in_groups(int64_t n, const F& f) {
  const int64_t groups = (n + Most - 1) / Most;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = g * n / groups;
    f((g + 1) * n / groups - first, first);
  }
}

constexpr int kRows = 9;  // sums in registers: 9 of AVX2's 16, and all of a 3 x 3 kernel
constexpr int kSide = 3;  // and those of a Gram matrix: 3 x 3

// A matrix [n, m] as Map reads it: groups of rows, each column by column.
template <class C, class At>
void pack(int64_t n, int64_t m, const At& at, C* packed) {
  in_groups<kRows>(n, [&](int64_t rows, int64_t first) {
    for (int64_t j = 0; j < m; j++)
      for (int64_t r = 0; r < rows; r++) *packed++ = at(first + r, j);
  });
}

// out [tiles][n][16] = (out +) matrix [n, m] in [tiles][m][16].
template <class C, bool Add>
struct Map {
  template <int Bytes, int R>
  WX_INLINE static void rows(const C* matrix, int64_t m, const C* in, C* out) {
    using V = typename Packs<C, Bytes>::F;
    constexpr int N = Packs<C, Bytes>::N;
    for (int part = 0; part < kFilters; part += N) {
      V sum[R] = {}, x, y;
      for (int64_t j = 0; j < m; j++) {
        get(x, in + j * kFilters + part);
#pragma GCC unroll 9
        for (int r = 0; r < R; r++) {
          y = V{} + matrix[j * R + r];
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
    for (int64_t t = 0; t < tiles; t++, in += m * kFilters, out += n * kFilters)
      in_groups<kRows>(n, [&](int64_t size, int64_t first) WX_ALWAYS {
        const C* part = matrix + first * m;
        C* to = out + first * kFilters;
        switch (size) {
          case 1:
            return rows<Bytes, 1>(part, m, in, to);
          case 2:
            return rows<Bytes, 2>(part, m, in, to);
          case 3:
            return rows<Bytes, 3>(part, m, in, to);
          case 4:
            return rows<Bytes, 4>(part, m, in, to);
          case 5:
            return rows<Bytes, 5>(part, m, in, to);
          case 6:
            return rows<Bytes, 6>(part, m, in, to);
          case 7:
            return rows<Bytes, 7>(part, m, in, to);
          case 8:
            return rows<Bytes, 8>(part, m, in, to);
          default:
            return rows<Bytes, 9>(part, m, in, to);
        }
      });
  }
};

// sums [n][m][16] += g [tiles][n][16] w [tiles][m][16], lane by lane.
template <class C>
struct Gram {
  template <int Bytes, int P, int Q>
  WX_INLINE static void block(const C* g, int64_t n, const C* w, int64_t m, int64_t tiles, C* sums) {
    using V = typename Packs<C, Bytes>::F;
    for (int part = 0; part < kFilters; part += Packs<C, Bytes>::N) {
      V sum[P][Q], x[Q], y;
#pragma GCC unroll 3
      for (int p = 0; p < P; p++)
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) get(sum[p][q], sums + (p * m + q) * kFilters + part);
      const C *from_g = g + part, *from_w = w + part;
      for (int64_t t = 0; t < tiles; t++, from_g += n * kFilters, from_w += m * kFilters) {
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) get(x[q], from_w + q * kFilters);
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
          get(y, from_g + p * kFilters);
#pragma GCC unroll 3
          for (int q = 0; q < Q; q++) fma<Bytes>(sum[p][q], y, x[q]);
        }
      }
#pragma GCC unroll 3
      for (int p = 0; p < P; p++)
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) put(sums + (p * m + q) * kFilters + part, sum[p][q]);
    }
  }

  template <int Bytes>
  WX_INLINE static void body(const C* g, int64_t n, const C* w, int64_t m, int64_t tiles, C* sums) {
    in_groups<kSide>(n, [&](int64_t rows, int64_t p) WX_ALWAYS {
      in_groups<kSide>(m, [&](int64_t columns, int64_t q) WX_ALWAYS {
        const auto run = [&](auto height, auto width) WX_ALWAYS {
          block<Bytes, decltype(height)::value, decltype(width)::value>(g + p * kFilters, n, w + q * kFilters, m, tiles,
                                                                        sums + (p * m + q) * kFilters);
        };
        const auto wide = [&](auto height) WX_ALWAYS {
          columns == 3 ? run(height, Taps<3>()) : columns == 2 ? run(height, Taps<2>()) : run(height, Taps<1>());
        };
        rows == 3 ? wide(Taps<3>()) : rows == 2 ? wide(Taps<2>()) : wide(Taps<1>());
      });
    });
  }
};

// out [n] = the sum of each 16 numbers, in an order that does not depend on the width of vectors.
template <class C>
struct LaneSums {
  template <int Bytes>
  WX_INLINE static void body(const C* sums, int64_t n, C* out) {
    for (int64_t k = 0; k < n; k++) {
      C s[kFilters];
      for (int l = 0; l < kFilters; l++) s[l] = sums[k * kFilters + l];
      for (int h = kFilters / 2; h > 0; h /= 2)
        for (int l = 0; l < h; l++) s[l] += s[l + h];
      out[k] = s[0];
    }
  }
};

// Numbers of another type, and back.
template <class C, class E>
struct Widen {
  template <int Bytes>
  WX_INLINE static void body(const E* from, int64_t n, C* to) {
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<C>(widen(from[i]));
  }
};
template <class C, class E>
struct Narrow {
  template <int Bytes>
  WX_INLINE static void body(const C* from, int64_t n, E* to) {
    for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
  }
};

// A copy whose stores go past the cache, of whole vectors to where they are aligned.
struct CopyPast {
  template <int Bytes>
  WX_INLINE static void body(const char* from, int64_t bytes, char* to) {
    for (int64_t i = 0; i < bytes; i += 64) {
      Vec<float> v;
      load<float>(v, reinterpret_cast<const float*>(from + i));
      stream<float>(reinterpret_cast<float*>(to + i), v);
    }
  }
};

}  // namespace wx::fw
