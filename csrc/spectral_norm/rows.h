// The passes of spectral normalization over rows of the weight; reference.py has the maths.
//
// A "row" is n numbers side by side. Half types are widened four rows at a time into `wide` [4 n], which stays in
// cache.
#pragma once
#include <cstddef>

#include "../common/vec.h"

namespace wx::sn {

template <class T>
WX_INLINE const Compute<T>* widened(const T* row, int64_t n, Compute<T>* wide) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return row;
  } else {
    for (int64_t j = 0; j < n; j++) wide[j] = widen(row[j]);
    return wide;
  }
}

// t = W x where x is given;  z += W'y where z is given, with y = t where y is not.
template <class T, bool kDot, bool kAxpy>
WX_INLINE void pass(const T* w, int64_t rows, int64_t n, const Compute<T>* x, Compute<T>* t, const Compute<T>* y,
                    Compute<T>* z, Compute<T>* wide) {
  using C = Compute<T>;
  const C* four[4];
  C c[4];
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    for (int k = 0; k < 4; k++) four[k] = widened(w + (r + k) * n, n, wide + k * n);
    if (kDot) dot4<C>(four, x, n, t + r);
    for (int k = 0; k < 4; k++) c[k] = kDot ? t[r + k] : y[r + k];
    if (kAxpy) axpy4<C>(z, c, four, n);
  }
  for (; r < rows; r++) {
    const C* row = widened(w + r * n, n, wide);
    if (kDot) t[r] = dot<C>(row, x, n);
    if (kAxpy) axpy<C>(z, kDot ? t[r] : y[r], row, n);
  }
}

constexpr int64_t kChunk = 512;  // numbers widened at a time where the row length does not matter

// out = s w
template <class T, class O, class C = Compute<T>>
WX_INLINE void scale_body(const T* w, O* out, int64_t n, C s, bool past_cache) {
  int64_t j = 0;
  if constexpr (std::is_same_v<T, O> && std::is_same_v<T, C>) {
    Vec<C> x;
    if (past_cache) {
      for (; j < n && reinterpret_cast<uintptr_t>(out + j) % 64; j++) out[j] = s * w[j];
      for (; j + kLanes<C> <= n; j += kLanes<C>) {
        load<C>(x, w + j);
        stream<C>(out + j, s * x);
      }
      stream_fence();
    }
    for (; j + kLanes<C> <= n; j += kLanes<C>) {
      load<C>(x, w + j);
      store<C>(out + j, s * x);
    }
  }
  for (; j < n; j++) narrow(s * widen(w[j]), out[j]);
}

// sum of g w
template <class G, class T, class C = Compute<T>>
WX_INLINE double inner_body(const G* g, const T* w, int64_t n) {
  double sum = 0;
  if constexpr (std::is_same_v<G, C> && std::is_same_v<T, C>) {
    constexpr int64_t kPart = 8192;  // added in C, 64 lanes side by side; the parts in double
    for (int64_t j = 0; j < n; j += kPart)
      sum += static_cast<double>(dot<C>(g + j, w + j, n - j < kPart ? n - j : kPart));
  } else {
    C a[kChunk], b[kChunk];
    for (int64_t j = 0; j < n; j += kChunk) {
      const int64_t m = n - j < kChunk ? n - j : kChunk;
      for (int64_t i = 0; i < m; i++) a[i] = widen(g[j + i]);
      for (int64_t i = 0; i < m; i++) b[i] = widen(w[j + i]);
      sum += static_cast<double>(dot<C>(a, b, m));
    }
  }
  return sum;
}

// dw += p g + q v
template <class G, class T, class C = Compute<T>>
WX_INLINE void add_body(const G* g, const C* v, T* dw, int64_t n, C p, C q) {
  int64_t j = 0;
  if constexpr (std::is_same_v<G, C> && std::is_same_v<T, C>) {
    Vec<C> a, b, sum;
    for (; j + kLanes<C> <= n; j += kLanes<C>) {
      load<C>(a, g + j);
      load<C>(b, v + j);
      load<C>(sum, dw + j);
      store<C>(dw + j, sum + (p * a + q * b));
    }
  }
  for (; j < n; j++) {
    T own;  // rounded first, as autograd adds gradients
    narrow(p * static_cast<C>(widen(g[j])) + q * v[j], own);
    narrow(static_cast<C>(widen(dw[j])) + static_cast<C>(widen(own)), dw[j]);
  }
}

// dw = p g + q v
template <class G, class T, class C = Compute<T>>
WX_INLINE void update_body(const G* g, const C* v, T* dw, int64_t n, C p, C q, bool past_cache) {
  int64_t j = 0;
  if constexpr (std::is_same_v<G, C> && std::is_same_v<T, C>) {
    Vec<C> a, b;
    if (past_cache) {
      for (; j < n && reinterpret_cast<uintptr_t>(dw + j) % 64; j++) dw[j] = p * g[j] + q * v[j];
      for (; j + kLanes<C> <= n; j += kLanes<C>) {
        load<C>(a, g + j);
        load<C>(b, v + j);
        stream<C>(dw + j, p * a + q * b);
      }
    }
    for (; j + kLanes<C> <= n; j += kLanes<C>) {
      load<C>(a, g + j);
      load<C>(b, v + j);
      store<C>(dw + j, p * a + q * b);
    }
  }
  for (; j < n; j++) narrow(p * static_cast<C>(widen(g[j])) + q * v[j], dw[j]);
}

#define WX_ROWS(T)                                                                                                     \
  WX_CLONES void rows_dot(const T* w, int64_t rows, int64_t n, const Compute<T>* x, Compute<T>* t, Compute<T>* wide) { \
    pass<T, true, false>(w, rows, n, x, t, nullptr, nullptr, wide);                                                    \
  }                                                                                                                    \
  WX_CLONES void rows_axpy(const T* w, int64_t rows, int64_t n, const Compute<T>* y, Compute<T>* z,                    \
                           Compute<T>* wide) {                                                                         \
    pass<T, false, true>(w, rows, n, nullptr, nullptr, y, z, wide);                                                    \
  }                                                                                                                    \
  WX_CLONES void rows_both(const T* w, int64_t rows, int64_t n, const Compute<T>* x, Compute<T>* t, Compute<T>* z,     \
                           Compute<T>* wide) {                                                                         \
    pass<T, true, true>(w, rows, n, x, t, nullptr, z, wide);                                                           \
  }
#define WX_SCALE(T, O)                                                                 \
  WX_CLONES void scale(const T* w, O* out, int64_t n, Compute<T> s, bool past_cache) { \
    scale_body<T, O>(w, out, n, s, past_cache);                                        \
  }
#define WX_BACKWARD(G, T)                                                                              \
  WX_CLONES double inner(const G* g, const T* w, int64_t n) { return inner_body<G, T>(g, w, n); }      \
  WX_CLONES void update(const G* g, const Compute<T>* v, T* dw, int64_t n, Compute<T> p, Compute<T> q, \
                        bool past_cache, bool add) {                                                   \
    if (add) return add_body<G, T>(g, v, dw, n, p, q);                                                 \
    update_body<G, T>(g, v, dw, n, p, q, past_cache);                                                  \
  }

WX_ROWS(float)
WX_ROWS(double)
WX_ROWS(bf16)
WX_ROWS(fp16)
WX_FOR_OUTPUTS(WX_SCALE)
WX_FOR_GRADIENTS(WX_BACKWARD)

#undef WX_ROWS
#undef WX_SCALE
#undef WX_BACKWARD

}  // namespace wx::sn
