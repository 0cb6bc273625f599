// The inner loops of the network over each filter; reference.py has the maths. Every product of two matrices here is
// small and in cache: one operand's entries are read one by one, the other's rows as vectors.
#pragma once
#include "../common/exp.h"

namespace wx::mlp {

enum class Activation { relu, silu, tanh };

// h = activation(x), and its slope where it is wanted.
template <Activation A, bool Slope, class C, int Bytes>
WX_INLINE void activate(const typename Packs<C, Bytes>::F& x, typename Packs<C, Bytes>::F& h,
                        typename Packs<C, Bytes>::F& slope) {
  using F = typename Packs<C, Bytes>::F;
  F one, power, rest;
  fill(one, C(1));
  if constexpr (A == Activation::relu) {
    h = x < F{} ? F{} : x;  // NaN stays
    if constexpr (Slope) slope = x > F{} ? one : F{};
  } else if constexpr (A == Activation::silu) {
    exp_parts<C, Bytes>(-x, power, rest);
    fma<Bytes>(power, power, rest);  // e^-x, between what exp_parts makes at most and at least: x may be any number
    F least, most;
    fill(least, -ExpParts<C>::kHigh), fill(most, -ExpParts<C>::kLow);
    const F s = x < least ? F{} : one / (one + power);
    h = x * s;
    if constexpr (Slope) {
      power = x > most ? F{} : power;
      slope = s + s * (h * power);  // 1 - s = s e^-x
    }
  } else {
    exp_parts<C, Bytes>(x + x, power, rest);
    F less = power - one;  // e^2x - 1
    fma<Bytes>(less, power, rest);
    h = less / (less + (one + one));
    if constexpr (Slope) slope = one - h * h;
  }
}

// y[r, :] (+)= sum over k of  a[r, k] x[k, :], rows of `width` numbers, a multiple of the lanes.
template <class C>
struct Product {
  struct Entries {
    const C* at;
    int64_t row, step;
  };
  struct Rows {
    C* at;
    int64_t step;
  };

  template <int Bytes, int R, int V>
  WX_INLINE static void block(Entries a, const C* x, int64_t ldx, int64_t count, Rows y, bool add) {
    using F = typename Packs<C, Bytes>::F;
    constexpr int N = Packs<C, Bytes>::N;
    F sum[R][V];
    each<R>([&](auto r) WX_ALWAYS { each<V>([&](auto v) WX_ALWAYS { sum[r][v] = F{}; }); });
    for (int64_t k = 0; k < count; k++) {
      F row[V];
      each<V>([&](auto v) WX_ALWAYS { get(row[v], x + k * ldx + v * N); });
      each<R>([&](auto r) WX_ALWAYS {
        F entry;
        fill(entry, a.at[r * a.row + k * a.step]);
        each<V>([&](auto v) WX_ALWAYS { fma<Bytes>(sum[r][v], entry, row[v]); });
      });
    }
    each<R>([&](auto r) WX_ALWAYS {
      each<V>([&](auto v) WX_ALWAYS {
        C* to = y.at + r * y.step + v * N;
        F before = F{};
        if (add) get(before, to);
        put(to, before + sum[r][v]);
      });
    });
  }

  template <int Bytes>
  WX_INLINE static void body(Entries a, int64_t rows, const C* x, int64_t ldx, int64_t count, Rows y, int64_t width,
                             bool add) {
    constexpr int N = Packs<C, Bytes>::N, kMost = Bytes == 64 ? 9 : 5;  // rows whose sums fit into the registers
    const int64_t blocks = (rows + kMost - 1) / kMost;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = b * rows / blocks, n = (b + 1) * rows / blocks - first;
      const Entries of{a.at + first * a.row, a.row, a.step};
      const Rows to{y.at + first * y.step, y.step};
      each<kMost>([&](auto less) WX_ALWAYS {
        if (n != less + 1) return;
        int64_t j = 0;
        for (; j + 2 * N <= width; j += 2 * N)
          block<Bytes, less + 1, 2>(of, x + j, ldx, count, {to.at + j, to.step}, add);
        if (j < width) block<Bytes, less + 1, 1>(of, x + j, ldx, count, {to.at + j, to.step}, add);
      });
    }
  }
};

// Forward, lanes are filters: h[j, f] = activation(u[j, f] + v_j).
template <class C, Activation A>
struct Hidden {
  template <int Bytes>
  WX_INLINE static void body(const C* u, const C* v, int64_t units, int64_t filters, C* h) {
    using F = typename Packs<C, Bytes>::F;
    constexpr int N = Packs<C, Bytes>::N;
    for (int64_t j = 0; j < units; j++)
      for (int64_t f = 0; f < filters; f += N) {
        F x, y, unused;
        get(x, u + j * filters + f);
        fill(y, v[j]);
        activate<A, false, C, Bytes>(x + y, y, unused);
        put(h + j * filters + f, y);
      }
  }
};

// Backward, lanes are hidden units: of x = u[f, j] + v_j, h = activation(x) and e = activation'(x) s[f, j], over s.
// sum[f, j] += e, dv_j += its sum over the filters.
template <class C, Activation A>
struct Slopes {
  static constexpr int kTotals = 4;  // of a sum over filters, whose number it divides: each rounds less than one would

  template <int Bytes>
  WX_INLINE static void body(const C* u, const C* v, const C* s, C* h, C* sum, C* dv, int64_t filters, int64_t units) {
    using F = typename Packs<C, Bytes>::F;
    constexpr int N = Packs<C, Bytes>::N;
    for (int64_t j = 0; j < units; j += N) {
      F bias, before, total[kTotals];
      get(bias, v + j);
      each<kTotals>([&](auto i) WX_ALWAYS { total[i] = F{}; });
      for (int64_t f = 0; f < filters; f += kTotals)
        each<kTotals>([&](auto i) WX_ALWAYS {
          const int64_t k = (f + i) * units + j;
          F x, y, e, slope, others;
          get(x, u + k);
          activate<A, true, C, Bytes>(x + bias, y, slope);
          put(h + k, y);
          get(e, s + k);
          e = e * slope;
          total[i] = total[i] + e;
          get(others, sum + k);
          put(sum + k, others + e);
        });
      get(before, dv + j);
      put(dv + j, before + ((total[0] + total[2]) + (total[1] + total[3])));
    }
  }
};

// [filters, taps] in memory to [taps, filters], zeros for the filters from `count` on; and back, with a bias for each
// tap.
template <class C, class T>
struct Turned {
  template <int Bytes>
  WX_INLINE static void body(const T* rows, int64_t count, int64_t taps, int64_t filters, C* columns) {
    for (int64_t f = 0; f < filters; f++)
      for (int64_t p = 0; p < taps; p++)
        columns[p * filters + f] = f < count ? static_cast<C>(widen(rows[f * taps + p])) : C(0);
  }
};
template <class C>
struct TurnedBack {
  template <int Bytes>
  WX_INLINE static void body(const C* columns, const C* bias, int64_t taps, int64_t filters, C* rows) {
    for (int64_t f = 0; f < filters; f++)
      for (int64_t p = 0; p < taps; p++) rows[f * taps + p] = columns[p * filters + f] + bias[p];
  }
};

// Numbers in a row, of another type; `past_cache` where `to` begins a cache line and n is a number of them.
template <class A, class B>
struct Copied {
  template <int Bytes>
  WX_INLINE static void body(const A* from, int64_t n, B* to, bool past_cache) {
    if (!past_cache) {
      for (int64_t j = 0; j < n; j++) narrow(static_cast<Compute<A>>(widen(from[j])), to[j]);
      return;
    }
    constexpr int64_t kLine = 64 / sizeof(B);
    for (int64_t j = 0; j < n; j += kLine) {
      alignas(64) B line[kLine];
      for (int64_t l = 0; l < kLine; l++) narrow(static_cast<Compute<A>>(widen(from[j + l])), line[l]);
      Vec<float> whole;
      __builtin_memcpy(&whole, line, sizeof whole);
      stream<float>(reinterpret_cast<float*>(to + j), whole);
    }
  }
};

// sum += x, n numbers.
template <class C>
struct Added {
  template <int Bytes>
  WX_INLINE static void body(const C* x, int64_t n, C* sum) {
    for (int64_t j = 0; j < n; j++) sum[j] += x[j];
  }
};

}  // namespace wx::mlp
