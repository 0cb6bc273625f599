// The passes over a tile that lies in L1: what comes from memory, what goes there, signs, windows.
//
// Elements are counted from the start of the tile; q and signs begin there. Whole words of 32 signs go in vectors.
#pragma once
#include "simd.h"

namespace wx::sub {

template <class T>
WX_INLINE void store_past(T* to, const T* from, int64_t n) {  // n numbers, 64 bytes at a time
  Vec<char> v;
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_memcpy(&v, reinterpret_cast<const char*>(from) + i, 64);
    stream<char>(reinterpret_cast<char*>(to) + i, v);
  }
}

// out_i = fl(theta0_i + flip(fl(q_i s))), begin <= i < end; t0 and out begin at element `begin`.
template <class T>
struct Finish {
  using C = Compute<T>;

  WX_INLINE static void one(const C* q, const uint32_t* signs, C s, const T* t0, T* out, int64_t i) {
    narrow(static_cast<C>(widen(*t0)) + flip(q[i] * s, sign_at(signs, i)), *out);
  }

  template <int Bytes>
  WX_INLINE static void body(const C* q, const uint32_t* signs, C s, const T* t0, T* out, int64_t begin, int64_t end,
                             bool past) {
    using P = Packs<C, Bytes>;
    int64_t i = begin;
    for (; i < end && i % 32; i++) one(q, signs, s, t0 + (i - begin), out + (i - begin), i);
    past = past && reinterpret_cast<uintptr_t>(out + (i - begin)) % 64 == 0;
    for (; i + 32 <= end; i += 32) {
      alignas(64) C y[32];
      alignas(64) T theta[32];
      for (int part = 0; part < 32 / P::N; part++) {
        typename P::F x;
        get(x, q + i + part * P::N);
        x = x * s;
        Flip32<C, Bytes>::apply(x, signs[i >> 5], part);
        put(y + part * P::N, x);
      }
      T* to = out + (i - begin);
      for (int l = 0; l < 32; l++) narrow(static_cast<C>(widen(t0[i - begin + l])) + y[l], theta[l]);
      if (past)
        store_past(to, theta, 32);
      else
        __builtin_memcpy(to, theta, sizeof theta);
    }
    for (; i < end; i++) one(q, signs, s, t0 + (i - begin), out + (i - begin), i);
  }
};

// q_i = flip(fl(g_i s)), begin <= i < end; g begins at element `begin`.
template <class T>
struct Begin {
  using C = Compute<T>;

  template <int Bytes>
  WX_INLINE static void body(C* q, const uint32_t* signs, C s, const T* g, int64_t begin, int64_t end) {
    using P = Packs<C, Bytes>;
    int64_t i = begin;
    for (; i < end && i % 32; i++) q[i] = flip(static_cast<C>(widen(g[i - begin])) * s, sign_at(signs, i));
    for (; i + 32 <= end; i += 32) {
      alignas(64) C x[32];
      for (int l = 0; l < 32; l++) x[l] = static_cast<C>(widen(g[i - begin + l])) * s;
      for (int part = 0; part < 32 / P::N; part++) {
        typename P::F v;
        get(v, x + part * P::N);
        Flip32<C, Bytes>::apply(v, signs[i >> 5], part);
        put(q + i + part * P::N, v);
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
    to -= begin;
    from -= begin;
    int64_t i = begin;
    for (; i < end && i % 32; i++) one(to[i], flip(from[i], sign_at(signs, i)));
    for (; i + 32 <= end; i += 32)
      for (int part = 0; part < 32 / P::N; part++) {
        typename P::F x, sum;
        get(x, from + i + part * P::N);
        Flip32<C, Bytes>::apply(x, signs[i >> 5], part);
        if constexpr (Add) {
          get(sum, to + i + part * P::N);
          x = sum + x;
        }
        put(to + i + part * P::N, x);
      }
    for (; i < end; i++) one(to[i], flip(from[i], sign_at(signs, i)));
  }
};

// to_j = from[places_j]: loads of single numbers are faster than the machines' gathers.
template <class C>
void gather(C* to, const C* from, const uint16_t* places, int64_t n) {
  using Bits = typename Packs<C, 16>::Bits;
  Bits* bits = reinterpret_cast<Bits*>(to);
  for (int64_t j = 0; j < n; j++) __builtin_memcpy(bits + j, from + places[j], sizeof(C));
}

template <class C>
WX_CLONES void add(C* to, const C* from, int64_t n) {
  for (int64_t j = 0; j < n; j++) to[j] += from[j];
}

}  // namespace wx::sub
