// Gram matrices of tiles, summed lane by lane and then over lanes.
#pragma once
#include "tile.h"

namespace wx::fw {

// sums [n][m][16] += g [tiles][n][16] w [tiles][m][16], lane by lane. `ahead`: in memory, what comes to the place of g.
template <class C>
struct Gram {
  template <int Bytes, int P, int Q>
  WX_INLINE static void block(const C* g, int64_t n, const C* w, int64_t m, int64_t tiles, C* sums) {
    using V = typename Packs<C, Bytes>::F;
    for (int part = 0; part < kFilters; part += Packs<C, Bytes>::N) {
      V sum[P][Q], x[Q], y;
#pragma GCC unroll 5
      for (int p = 0; p < P; p++)
#pragma GCC unroll 5
        for (int q = 0; q < Q; q++) get(sum[p][q], sums + (p * m + q) * kFilters + part);
      const C *from_g = g + part, *from_w = w + part;
      for (int64_t t = 0; t < tiles; t++, from_g += n * kFilters, from_w += m * kFilters) {
#pragma GCC unroll 5
        for (int q = 0; q < Q; q++) get(x[q], from_w + q * kFilters);
#pragma GCC unroll 5
        for (int p = 0; p < P; p++) {
          get(y, from_g + p * kFilters);
#pragma GCC unroll 5
          for (int q = 0; q < Q; q++) fma<Bytes>(sum[p][q], y, x[q]);
        }
      }
#pragma GCC unroll 5
      for (int p = 0; p < P; p++)
#pragma GCC unroll 5
        for (int q = 0; q < Q; q++) put(sums + (p * m + q) * kFilters + part, sum[p][q]);
    }
  }

  template <int Bytes>
  WX_INLINE static void body(const C* g, int64_t n, const C* w, int64_t m, int64_t tiles, C* sums, Ahead ahead) {
    constexpr int kSide = Bytes == 64 ? 5 : 3;  // squares that registers hold
    const int64_t numbers = tiles * n * kFilters, blocks = (n + kSide - 1) / kSide * ((m + kSide - 1) / kSide);
    int64_t done = 0;
    in_groups<kSide>(n, [&](int64_t rows, int64_t p) WX_ALWAYS {
      in_groups<kSide>(m, [&](int64_t columns, int64_t q) WX_ALWAYS {
        const int64_t begin = done * numbers / blocks, end = ++done * numbers / blocks;
        if (ahead.at) ahead.ask(begin, end - begin, ahead.item);
        with_size<kSide>(rows, [&](auto height) WX_ALWAYS {
          with_size<kSide>(columns, [&](auto width) WX_ALWAYS {
            block<Bytes, height.value, width.value>(g + p * kFilters, n, w + q * kFilters, m, tiles,
                                                    sums + (p * m + q) * kFilters);
          });
        });
      });
    });
  }
};

// out [n] += the sum of each 16 numbers, in an order that does not depend on the width of vectors.
template <class C>
struct LaneSums {
  template <int Half, class V, size_t... I>
  WX_INLINE static void fold(V& x, std::index_sequence<I...> lanes) {
    if constexpr (Half > 0) {
      x = x + __builtin_shufflevector(x, x, ((I + Half) % sizeof...(I))...);
      fold<Half / 2>(x, lanes);
    }
  }
  template <int Bytes>
  WX_INLINE static void body(const C* sums, int64_t n, C* out) {
    using V = typename Packs<C, Bytes>::F;
    constexpr int N = Packs<C, Bytes>::N, kParts = kFilters / N;
    for (int64_t k = 0; k < n; k++) {
      V x[kParts];
      for (int i = 0; i < kParts; i++) get(x[i], sums + k * kFilters + i * N);
      for (int h = kParts / 2; h > 0; h /= 2)
        for (int i = 0; i < h; i++) x[i] = x[i] + x[i + h];
      fold<N / 2>(x[0], std::make_index_sequence<N>());
      out[k] += x[0][0];
    }
  }
};

}  // namespace wx::fw
