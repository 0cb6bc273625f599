// Rows of numbers: loads that widen, dot products, sums of scaled rows, stores that narrow.
//
// Written on vectors of 64 bytes, which the compiler lowers to what each clone has (AVX-512, AVX2, SSE2). Sums run in
// lanes whose number does not depend on the clone, so results depend on neither threads nor blocking.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define WX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define WX_CLONES __attribute__((noinline))
#endif
#define WX_INLINE inline __attribute__((always_inline))

// Every weight dtype with every output dtype, and every gradient dtype with the weight dtypes that it goes with.
// clang-format off
#define WX_FOR_OUTPUTS(F) \
  F(float, float) F(float, double) F(float, bf16) F(float, fp16) \
  F(double, double) F(double, float) F(double, bf16) F(double, fp16) \
  F(bf16, bf16) F(bf16, float) F(bf16, double) F(bf16, fp16) \
  F(fp16, fp16) F(fp16, float) F(fp16, double) F(fp16, bf16)
#define WX_FOR_GRADIENTS(F) \
  F(float, float) F(bf16, float) F(fp16, float) F(double, double) F(bf16, bf16) F(fp16, fp16)
// clang-format on

namespace wx {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class C>
using Vec __attribute__((vector_size(64))) = C;
template <class C>
constexpr int64_t kLanes = 64 / sizeof(C);

template <class C>
WX_INLINE void load(Vec<C>& v, const C* p) {
  __builtin_memcpy(&v, p, sizeof v);
}
template <class C>
WX_INLINE void store(C* p, const Vec<C>& v) {
  __builtin_memcpy(p, &v, sizeof v);
}
WX_INLINE float lane_sum(const Vec<float>& v) {
  const auto a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
WX_INLINE double lane_sum(const Vec<double>& v) {
  const auto a = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (a[0] + a[2]) + (a[1] + a[3]);
}

// Conversions, bit by bit, so that they vectorise without F16C or AVX-512 BF16. Round to nearest even; NaN stays NaN.

WX_INLINE float from_bits(uint32_t b) {
  float f;
  __builtin_memcpy(&f, &b, 4);
  return f;
}
WX_INLINE uint32_t to_bits(float f) {
  uint32_t b;
  __builtin_memcpy(&b, &f, 4);
  return b;
}
WX_INLINE float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
WX_INLINE float widen(fp16 x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float normal = from_bits(magnitude) * 0x1p112f;  // rebias the exponent; also right for subnormals
  const uint32_t special = magnitude | 0x7F800000u;      // Inf and NaN
  return from_bits((magnitude >= 0x0F800000u ? special : to_bits(normal)) | sign);
}
WX_INLINE float widen(float x) { return x; }
WX_INLINE double widen(double x) { return x; }

WX_INLINE void narrow(float f, bf16& out) {
  const uint32_t b = to_bits(f), rounded = b + 0x7FFFu + ((b >> 16) & 1u);
  out.bits = static_cast<uint16_t>((b & 0x7FFFFFFFu) > 0x7F800000u ? (b >> 16) | 0x40u : rounded >> 16);
}
WX_INLINE void narrow(float f, fp16& out) {
  const uint32_t b = to_bits(f), magnitude = b & 0x7FFFFFFFu;
  const uint32_t rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;  // normal
  const uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);  // subnormal: the adder rounds
  uint32_t h = magnitude < (113u << 23) ? small : rounded;
  h = magnitude >= 0x477FF000u ? 0x7C00u : h;  // 65520 and above
  h = magnitude > 0x7F800000u ? 0x7E00u : h;
  out.bits = static_cast<uint16_t>(h | (b >> 16 & 0x8000u));
}
WX_INLINE void narrow(float f, float& out) { out = f; }
WX_INLINE void narrow(float f, double& out) { out = f; }
WX_INLINE void narrow(double f, double& out) { out = f; }
WX_INLINE void narrow(double f, float& out) { out = static_cast<float>(f); }
WX_INLINE void narrow(double f, bf16& out) { narrow(static_cast<float>(f), out); }
WX_INLINE void narrow(double f, fp16& out) { narrow(static_cast<float>(f), out); }

// Sums over one, or four, rows of n numbers.

template <class C>
WX_INLINE C dot(const C* a, const C* b, int64_t n) {
  Vec<C> s[4] = {}, x, y;
  int64_t j = 0;
  for (; j + 4 * kLanes<C> <= n; j += 4 * kLanes<C>)
    for (int k = 0; k < 4; k++) {
      load<C>(x, a + j + k * kLanes<C>);
      load<C>(y, b + j + k * kLanes<C>);
      s[k] += x * y;
    }
  for (; j + kLanes<C> <= n; j += kLanes<C>) {
    load<C>(x, a + j);
    load<C>(y, b + j);
    s[0] += x * y;
  }
  C t = lane_sum((s[0] + s[1]) + (s[2] + s[3]));
  for (; j < n; j++) t += a[j] * b[j];
  return t;
}

template <class C>
WX_INLINE void dot4(const C* const* rows, const C* x, int64_t n, C* t) {
  Vec<C> s[4] = {}, r[4] = {}, a, b, w;
  int64_t j = 0;
  for (; j + 2 * kLanes<C> <= n; j += 2 * kLanes<C>) {
    load<C>(a, x + j);
    load<C>(b, x + j + kLanes<C>);
    for (int k = 0; k < 4; k++) {
      load<C>(w, rows[k] + j);
      s[k] += w * a;
      load<C>(w, rows[k] + j + kLanes<C>);
      r[k] += w * b;
    }
  }
  for (int k = 0; k < 4; k++) {
    t[k] = lane_sum(s[k] + r[k]);
    for (int64_t i = j; i < n; i++) t[k] += rows[k][i] * x[i];
  }
}

template <class C>
WX_INLINE void axpy(C* y, C c, const C* x, int64_t n) {
  Vec<C> a, b;
  int64_t j = 0;
  for (; j + kLanes<C> <= n; j += kLanes<C>) {
    load<C>(a, y + j);
    load<C>(b, x + j);
    store<C>(y + j, a + c * b);
  }
  for (; j < n; j++) y[j] += c * x[j];
}

template <class C>
WX_INLINE void axpy4(C* y, const C* c, const C* const* rows, int64_t n) {
  Vec<C> a, w[4];
  int64_t j = 0;
  for (; j + kLanes<C> <= n; j += kLanes<C>) {
    load<C>(a, y + j);
    for (int k = 0; k < 4; k++) load<C>(w[k], rows[k] + j);
    store<C>(y + j, a + ((c[0] * w[0] + c[1] * w[1]) + (c[2] * w[2] + c[3] * w[3])));
  }
  for (; j < n; j++) y[j] += (c[0] * rows[0][j] + c[1] * rows[1][j]) + (c[2] * rows[2][j] + c[3] * rows[3][j]);
}

// Stores past the cache: an output that is larger than it would only push out what is still to be read.
template <class C>
WX_INLINE void stream(C* p, const Vec<C>& v) {
#if defined(__SSE2__)
  __m128i part[4];
  __builtin_memcpy(part, &v, sizeof v);
  for (int k = 0; k < 4; k++) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + k, part[k]);
#else
  store<C>(p, v);
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace wx
