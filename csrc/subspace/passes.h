// The passes over a tile that lies in L1: what comes from memory, what goes there, signs, windows.
//
// Elements are counted from the start of the tile; q and signs begin there. Whole words of 32 signs go in vectors.
#pragma once
#include "simd.h"

namespace wx::sub {

// A vector past the cache.
template <class V>
WX_INLINE void put_past(void* p, const V& v) {
#if defined(__x86_64__) && defined(__gnu_linux__)
  if constexpr (sizeof v > 16)
    asm volatile("vmovntps %1, %0" : "=m"(*static_cast<V*>(p)) : "v"(v));
  else
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<const __m128i&>(v));
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}

// x = from[places_0 ..]: loads of single numbers, four places at a time, are faster than the machines' gathers.
template <class C, int Bytes>
WX_INLINE void pick(typename Packs<C, Bytes>::F& x, const C* from, const uint16_t* places) {
  using V = typename Pack<C, 16>::V;
  constexpr int kQuarters = Bytes / 16;
  V v[kQuarters];
#pragma GCC unroll 4
  for (int q = 0; q < kQuarters; q++) {
    if constexpr (sizeof(C) == 4) {
      uint64_t four;
      __builtin_memcpy(&four, places + 4 * q, 8);
      v[q] = V{from[four & 0xFFFF], from[four >> 16 & 0xFFFF], from[four >> 32 & 0xFFFF], from[four >> 48]};
    } else {
      v[q] = V{from[places[2 * q]], from[places[2 * q + 1]]};
    }
  }
  if constexpr (Bytes == 16) {
    x = v[0];
  } else {
    constexpr int n = 16 / sizeof(C);
    typename Pack<C, 32>::V low, high;
    join(low, v[0], v[1], std::make_index_sequence<2 * n>());
    if constexpr (Bytes == 32) {
      x = low;
    } else {
      join(high, v[2], v[3], std::make_index_sequence<2 * n>());
      join(x, low, high, std::make_index_sequence<4 * n>());
    }
  }
}

// out_i = fl(theta0_i + flip(fl(q_i s))), begin <= i < end; t0 and out begin at element `begin`. Where blocks are
// moved, window[places_i] stands for q_i.
template <class T, bool Moved>
struct Finish {
  using C = Compute<T>;

  template <int Bytes>
  WX_INLINE static void body(const C* q, const uint16_t* places, const uint32_t* signs, C s, const T* t0, T* out,
                             int64_t begin, int64_t end, bool past, Ahead ahead) {
    using P = Packs<C, Bytes>;
    constexpr bool kSame = std::is_same_v<T, C>;
    const auto one = [&](int64_t i) WX_ALWAYS {
      const C y = flip(q[Moved ? places[i] : i] * s, sign_at(signs, i));
      narrow(static_cast<C>(widen(t0[i])) + y, out[i]);
    };
    t0 -= begin;
    out -= begin;
    int64_t i = begin;
    for (; i < end && i % 32; i++) one(i);
    past = past && reinterpret_cast<uintptr_t>(out + i) % 64 == 0;
    const SignMasks<C, Bytes> masks;
    alignas(64) C y[32];
    for (; i + 32 <= end; i += 32) {
#pragma GCC unroll 1  // more at once is more than the registers hold
      for (int l = 0; l < 32; l += P::N) {
        typename P::F x, theta;
        if constexpr (Moved) {
          ahead.ask(i + l, P::N, sizeof(T));
          pick<C, Bytes>(x, q, places + i + l);
        } else {
          get(x, q + i + l);
        }
        x = x * s;
        masks.flip(x, signs[i >> 5], l / P::N);
        get_as<C, Bytes>(theta, t0 + i + l);
        theta = theta + x;
        if constexpr (!kSame)
          put(y + l, theta);
        else if (past)
          put_past(out + i + l, theta);
        else
          put(out + i + l, theta);
      }
      if constexpr (!kSame) {
        alignas(64) T theta[32];
        for (int l = 0; l < 32; l++) narrow(y[l], theta[l]);
        typename Pack<uint64_t, Bytes>::V v;
        for (int b = 0; b < 64; b += Bytes) {
          __builtin_memcpy(&v, reinterpret_cast<const char*>(theta) + b, Bytes);
          char* to = reinterpret_cast<char*>(out + i) + b;
          if (past)
            put_past(to, v);
          else
            __builtin_memcpy(to, &v, Bytes);
        }
      }
    }
    for (; i < end; i++) one(i);
  }
};

// q_i = flip(fl(g_i s)), begin <= i < end; g begins at element `begin`.
template <class T>
struct Begin {
  using C = Compute<T>;

  template <int Bytes>
  WX_INLINE static void body(C* q, const uint32_t* signs, C s, const T* g, int64_t begin, int64_t end) {
    using P = Packs<C, Bytes>;
    const SignMasks<C, Bytes> masks;
    int64_t i = begin;
    for (; i < end && i % 32; i++) q[i] = flip(static_cast<C>(widen(g[i - begin])) * s, sign_at(signs, i));
    for (; i + 32 <= end; i += 32) {
      for (int part = 0; part < 32 / P::N; part++) {
        typename P::F x;
        get_as<C, Bytes>(x, g - begin + i + part * P::N);
        x = x * s;
        masks.flip(x, signs[i >> 5], part);
        put(q + i + part * P::N, x);
      }
    }
    for (; i < end; i++) q[i] = flip(static_cast<C>(widen(g[i - begin])) * s, sign_at(signs, i));
  }
};

// to_i (+)= flip(from_i), begin <= i < end, signs by i; `to` and `from` begin at element `begin`.
template <class C, bool Add>
struct Flipped {
  WX_INLINE static void one(C& to, C x) { to = Add ? to + x : x; }

  template <int Bytes>
  WX_INLINE static void body(C* to, const C* from, const uint32_t* signs, int64_t begin, int64_t end) {
    using P = Packs<C, Bytes>;
    const SignMasks<C, Bytes> masks;
    to -= begin;
    from -= begin;
    int64_t i = begin;
    for (; i < end && i % 32; i++) one(to[i], flip(from[i], sign_at(signs, i)));
    for (; i + 32 <= end; i += 32)
      for (int part = 0; part < 32 / P::N; part++) {
        typename P::F x, sum;
        get(x, from + i + part * P::N);
        masks.flip(x, signs[i >> 5], part);
        if constexpr (Add) {
          get(sum, to + i + part * P::N);
          x = sum + x;
        }
        put(to + i + part * P::N, x);
      }
    for (; i < end; i++) one(to[i], flip(from[i], sign_at(signs, i)));
  }
};

// to_j (+)= from[places_j], j < n.
template <class C, bool Add>
struct Gather {
  template <int Bytes>
  WX_INLINE static void body(C* to, const C* from, const uint16_t* places, int64_t n, Ahead ahead) {
    using P = Packs<C, Bytes>;
    int64_t j = 0;
    for (; j + P::N <= n; j += P::N) {
      typename P::F x, sum;
      ahead.ask(j, P::N, ahead.item);
      pick<C, Bytes>(x, from, places + j);
      if constexpr (Add) {
        get(sum, to + j);
        x = sum + x;
      }
      put(to + j, x);
    }
    for (; j < n; j++) to[j] = Add ? to[j] + from[places[j]] : from[places[j]];
  }
};

}  // namespace wx::sub
