// 16 filters of K taps, filter by filter in memory, as K rows of 16 numbers, tap by tap, and back; in registers.
//
// Element e of N filters lies in vector v = e div N, lane i = e mod N, and belongs to tap p = e mod K. For odd K the N
// elements of a tap lie in N different lanes, and v = (p - i) / N mod K: with the vectors in the order U_s = V_(s/N),
// tap p is in lane i of U_(p-i). So the lanes are rotated through the vectors, lane i by i, bit by bit of i, and then
// each vector is permuted. For even K the even elements are N filters of the even taps, the odd ones of the odd taps.
#pragma once
#include <array>
#include <utility>

#include "tile.h"

namespace wx::fw {

// 1 / a mod n, for a prime to n.
constexpr int inverse(int a, int n) {
  int x = 0;
  while (n > 1 && a * x % n != 1) x++;
  return x;
}

template <class C, int Bytes, int K>
struct Transpose {
  using V = typename Packs<C, Bytes>::F;
  static constexpr int N = Packs<C, Bytes>::N;
  using Lanes = std::make_index_sequence<N>;
  using Rows = std::array<V, K>;

  template <size_t... I>
  WX_INLINE static void even(V& x, const V& a, const V& b, std::index_sequence<I...>) {
    x = __builtin_shufflevector(a, b, (2 * I)...);
  }
  template <size_t... I>
  WX_INLINE static void odd(V& x, const V& a, const V& b, std::index_sequence<I...>) {
    x = __builtin_shufflevector(a, b, (2 * I + 1)...);
  }
  // Half `H` of a_0 b_0 a_1 b_1 ...
  template <int H, size_t... I>
  WX_INLINE static void zip(V& x, const V& a, const V& b, std::index_sequence<I...>) {
    x = __builtin_shufflevector(a, b, ((I + H * N) / 2 + I % 2 * N)...);
  }
  // Lanes with `Bit` set of b, the others of a.
  template <int Bit, size_t... I>
  WX_INLINE static void blend(V& x, const V& a, const V& b, std::index_sequence<I...>) {
    x = __builtin_shufflevector(a, b, (I & Bit ? N + I : I)...);
  }
  // Lane l takes lane K l + p, or gives to it.
  template <int P, size_t... I>
  WX_INLINE static void gather(V& x, std::index_sequence<I...>) {
    x = __builtin_shufflevector(x, x, ((K * I + P) % N)...);
  }
  template <int P, size_t... I>
  WX_INLINE static void scatter(V& x, std::index_sequence<I...>) {
    x = __builtin_shufflevector(x, x, ((I + K * N - P) * inverse(K % N, N) % N)...);
  }

  // Lanes with `Bit` set go on by `Step` vectors.
  template <int Bit, int Step, size_t... S>
  WX_INLINE static void rotate(Rows& u, std::index_sequence<S...>) {
    const Rows before = u;
    (blend<Bit>(u[S], before[S], before[(S + (K - 1) * Step) % K], Lanes{}), ...);
  }
  template <bool Back, size_t... S>
  WX_INLINE static void rotate_all(Rows& u, std::index_sequence<S...> all) {
    if constexpr (N > 1) rotate<1, (Back ? K - 1 : 1)>(u, all);
    if constexpr (N > 2) rotate<2, (Back ? K - 1 : 1) * 2>(u, all);
    if constexpr (N > 4) rotate<4, (Back ? K - 1 : 1) * 4>(u, all);
    if constexpr (N > 8) rotate<8, (Back ? K - 1 : 1) * 8>(u, all);
  }

  template <size_t... S>
  WX_INLINE static void forward_odd(Rows& v, std::index_sequence<S...> all) {
    constexpr int kInverse = inverse(N % K, K);
    Rows u = {v[S * kInverse % K]...};
    rotate_all<false>(u, all);
    (gather<S>(u[S], Lanes{}), ...);
    v = u;
  }
  template <size_t... S>
  WX_INLINE static void back_odd(Rows& t, std::index_sequence<S...> all) {
    (scatter<S>(t[S], Lanes{}), ...);
    rotate_all<true>(t, all);
    t = Rows{t[S * N % K]...};
  }
  template <size_t... S>
  WX_INLINE static void forward_even(Rows& v, std::index_sequence<S...>) {
    using Half = Transpose<C, Bytes, K / 2>;
    typename Half::Rows evens, odds;
    (even(evens[S], v[2 * S], v[2 * S + 1], Lanes{}), ...);
    (odd(odds[S], v[2 * S], v[2 * S + 1], Lanes{}), ...);
    Half::forward(evens);
    Half::forward(odds);
    ((v[2 * S] = evens[S], v[2 * S + 1] = odds[S]), ...);
  }
  template <size_t... S>
  WX_INLINE static void back_even(Rows& t, std::index_sequence<S...>) {
    using Half = Transpose<C, Bytes, K / 2>;
    typename Half::Rows evens, odds;
    ((evens[S] = t[2 * S], odds[S] = t[2 * S + 1]), ...);
    Half::back(evens);
    Half::back(odds);
    (zip<0>(t[2 * S], evens[S], odds[S], Lanes{}), ...);
    (zip<1>(t[2 * S + 1], evens[S], odds[S], Lanes{}), ...);
  }

  WX_INLINE static void forward(Rows& v) {
    if constexpr (K % 2)
      forward_odd(v, std::make_index_sequence<K>());
    else
      forward_even(v, std::make_index_sequence<K / 2>());
  }
  WX_INLINE static void back(Rows& t) {
    if constexpr (K % 2)
      back_odd(t, std::make_index_sequence<K>());
    else
      back_even(t, std::make_index_sequence<K / 2>());
  }

  template <size_t... S>
  WX_INLINE static void read(const C* filters, C* taps, std::index_sequence<S...>) {
    Rows v;
    (get(v[S], filters + S * N), ...);
    forward(v);
    (put(taps + S * kFilters, v[S]), ...);
  }
  template <size_t... S>
  WX_INLINE static void write(const C* taps, C* filters, std::index_sequence<S...>) {
    Rows v;
    (get(v[S], taps + S * kFilters), ...);
    back(v);
    (put(filters + S * N, v[S]), ...);
  }
};

// filters [tiles][16][K] to taps [K][16], `stride` numbers from tile to tile; K = 0: any, from `taps_each`.
template <class C, int K>
struct ToTaps {
  template <int Bytes>
  WX_INLINE static void body(const C* filters, int64_t tiles, int64_t taps_each, C* taps, int64_t stride) {
    for (int64_t t = 0; t < tiles; t++, taps += stride) {
      if constexpr (K == 0) {
        for (int l = 0; l < kFilters; l++)
          for (int64_t p = 0; p < taps_each; p++) taps[p * kFilters + l] = *filters++;
      } else {
        using Of = Transpose<C, Bytes, K>;
        for (int part = 0; part < kFilters; part += Of::N, filters += Of::N * K)
          Of::read(filters, taps + part, std::make_index_sequence<K>());
      }
    }
  }
};

// The same backwards.
template <class C, int K>
struct FromTaps {
  template <int Bytes>
  WX_INLINE static void body(const C* taps, int64_t stride, int64_t tiles, int64_t taps_each, C* filters) {
    for (int64_t t = 0; t < tiles; t++, taps += stride) {
      if constexpr (K == 0) {
        for (int l = 0; l < kFilters; l++)
          for (int64_t p = 0; p < taps_each; p++) *filters++ = taps[p * kFilters + l];
      } else {
        using Of = Transpose<C, Bytes, K>;
        for (int part = 0; part < kFilters; part += Of::N, filters += Of::N * K)
          Of::write(taps + part, filters, std::make_index_sequence<K>());
      }
    }
  }
};

// f of the sizes that occur most as constants, else of 0.
template <class F>
void with_taps(int64_t taps, const F& f) {
  switch (taps) {
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 9:
      return f(std::integral_constant<int, 9>());
    case 25:
      return f(std::integral_constant<int, 25>());
    case 27:
      return f(std::integral_constant<int, 27>());
    case 49:
      return f(std::integral_constant<int, 49>());
    default:
      return f(std::integral_constant<int, 0>());
  }
}

}  // namespace wx::fw
