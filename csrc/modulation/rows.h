// The inner loops of modulation, over the I K numbers of one output channel; reference.py has the maths. `s` is a
// sample's style for each of these numbers (each factor K times), so that no loop has to know where a filter ends.
#pragma once
#include <algorithm>
#include <cmath>

#include "../common/simd.h"

namespace wx::mod {

// to_i, K times each.
template <class C>
struct Expanded {
  template <int Bytes>
  WX_INLINE static void body(const C* from, int64_t channels, int64_t taps, C* to) {
    for (int64_t i = 0; i < channels; i++)
      for (int64_t p = 0; p < taps; p++) *to++ = from[i];
  }
};

// out_i = sum over p of  x[i, p], or of its square; in four parts, which are faster and round less than one.
template <class C, bool Squared>
struct TapSums {
  WX_INLINE static C term(C x) { return Squared ? x * x : x; }

  template <int Bytes>
  WX_INLINE static void body(const C* x, int64_t channels, int64_t taps, C* out) {
    for (int64_t i = 0; i < channels; i++, x += taps) {
      C sum[4] = {};
      int64_t p = 0;
      for (; p + 4 <= taps; p += 4)
        for (int64_t k = 0; k < 4; k++) sum[k] += term(x[p + k]);
      for (; p < taps; p++) sum[p & 3] += term(x[p]);
      out[i] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    }
  }
};

// d_n = (<squares_n, energy> + eps)^(-1/2), a step apart.
template <class C>
struct Scales {
  template <int Bytes>
  WX_INLINE static void body(const C* squares, const C* energy, int64_t samples, int64_t channels, C eps, C* d,
                             int64_t step) {
    for (int64_t n = 0; n < samples; n++)
      d[n * step] = C(1) / std::sqrt(dot(squares + n * channels, energy, channels) + eps);
  }
};

// out = w s d; `past_cache` writes whole cache lines around the cache.
template <class C, class O>
struct Modulated {
  static constexpr int64_t kLine = 64 / std::min(sizeof(C), sizeof(O));  // numbers: at least 64 bytes of each

  WX_INLINE static void stream_as(O* out, const C* wide) {
    alignas(64) O narrowed[kLine];
    for (int64_t l = 0; l < kLine; l++) narrow(wide[l], narrowed[l]);
    each<kLine * sizeof(O) / 64>([&](auto k) WX_ALWAYS {
      constexpr int64_t kAt = k * 64 / sizeof(O);
      Vec<float> line;
      __builtin_memcpy(&line, narrowed + kAt, sizeof line);
      stream<float>(reinterpret_cast<float*>(out + kAt), line);
    });
  }

  template <int Bytes>
  WX_INLINE static void body(const C* w, const C* s, C d, O* out, int64_t n, bool past_cache) {
    using F = typename Packs<C, Bytes>::F;
    constexpr int64_t N = Packs<C, Bytes>::N;
    int64_t j = 0;
    const auto one_by_one = [&](int64_t end) WX_ALWAYS {
      for (; j < end; j++) narrow((s[j] * d) * w[j], out[j]);
    };
    if (past_cache) {
      one_by_one(std::min<int64_t>(n, (-reinterpret_cast<uintptr_t>(out) & 63) / sizeof(O)));
      for (; j + kLine <= n; j += kLine) {
        alignas(64) C wide[kLine];
        each<kLine / N>([&](auto k) WX_ALWAYS {
          F x, y;
          get(x, s + j + k * N);
          get(y, w + j + k * N);
          put(wide + k * N, (x * d) * y);
        });
        stream_as(out + j, wide);
      }
    }
    one_by_one(n);
  }
};

// A sample's gradient of R output channels: with t = g w,  z += d t,  dw += d s g,  b += sum of  s t.
template <class C, class G, int R>
struct Gradients {
  template <int Bytes>
  WX_INLINE static void body(const G* g, int64_t step, const C* w, C* dw, int64_t row, const C* d, const C* s, C* z,
                             C* b, int64_t n, int64_t ahead) {
    using P = Packs<C, Bytes>;
    using F = typename P::F;
    constexpr int kParts = 64 / Bytes;
    F sum[R][kParts] = {}, scale[R];
    each<R>([&](auto r) WX_ALWAYS { fill(scale[r], d[r]); });
    int64_t j = 0;
    for (; j + kParts * P::N <= n; j += kParts * P::N)
      each<kParts>([&](auto part) WX_ALWAYS {
        const int64_t k = j + part * P::N;
        F sr, zr;
        get(sr, s + k);
        get(zr, z + k);
        each<R>([&](auto r) WX_ALWAYS {
          F gr, t, dr;
          if (part == 0) __builtin_prefetch(g + r * step + k + ahead, 0, 3);
          get_as<C, Bytes>(gr, g + r * step + k);
          get(t, w + r * row + k);
          get(dr, dw + r * row + k);
          t = t * gr;
          fma<Bytes>(zr, scale[r], t);
          fma<Bytes>(sum[r][part], sr, t);
          fma<Bytes>(dr, scale[r] * sr, gr);
          put(dw + r * row + k, dr);
        });
        put(z + k, zr);
      });
    each<R>([&](auto r) WX_ALWAYS {
      alignas(64) C lanes[kParts * P::N];
      each<kParts>([&](auto part) WX_ALWAYS { put(lanes + part * P::N, sum[r][part]); });
      for (int64_t k = j; k < n; k++) {
        const C x = static_cast<C>(widen(g[r * step + k])), t = w[r * row + k] * x;
        z[k] += d[r] * t;
        dw[r * row + k] += d[r] * s[k] * x;
        lanes[0] += s[k] * t;
      }
      Vec<C> all;
      load<C>(all, lanes);
      b[r] += lane_sum(all);
    });
  }
};

// dweight[i, p] = dw[i, p] - w[i, p] c_i
template <class C, class T>
struct Corrected {
  template <int Bytes>
  WX_INLINE static void body(const C* dw, const C* w, const C* c, int64_t channels, int64_t taps, T* out) {
    for (int64_t i = 0; i < channels; i++)
      for (int64_t p = 0; p < taps; p++, dw++, w++, out++) narrow(*dw - *w * c[i], *out);
  }
};

// out += sum over rows of  a_r x_r, the rows of x [rows, n].
template <class C>
struct AddRows {
  template <int Bytes>
  WX_INLINE static void body(const C* a, int64_t step, const C* x, int64_t rows, int64_t n, C* out) {
    for (int64_t r = 0; r < rows; r++) axpy(out, a[r * step], x + r * n, n);
  }
};

template <class C, class T>
struct Widened {
  template <int Bytes>
  WX_INLINE static void body(const T* from, int64_t n, C* to) {
    for (int64_t j = 0; j < n; j++) to[j] = static_cast<C>(widen(from[j]));
  }
};

}  // namespace wx::mod
