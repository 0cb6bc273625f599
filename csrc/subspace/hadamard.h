// H x in place, unnormalised, pairs in the order of strides 1, 2, 4, ... as reference.py has it: the same bits.
//
// The first stages are made in registers: of two vectors the even lanes give a and the odd ones b; a + b and a - b are
// the next two vectors. Each such stage turns the bits of the index by one place, so after log2(2 N) of them lanes are
// where they were. Stages across up to 8 such pairs follow before anything is stored; what is left goes in rows of
// vectors, 2 to 16 at a time: a tile of 4096 floats is read and written twice.
#pragma once
#include "simd.h"

namespace wx::sub {

template <class V, size_t... I>
WX_INLINE void split(V& even, V& odd, const V& a, const V& b, std::index_sequence<I...>) {
  even = __builtin_shufflevector(a, b, (2 * I)...);
  odd = __builtin_shufflevector(a, b, (2 * I + 1)...);
}

template <class C, int Bytes>
struct Hadamard {
  using P = Packs<C, Bytes>;
  using F = typename P::F;
  static constexpr int N = P::N;
  static constexpr int kPairs = Bytes == 64 ? 8 : 4;  // in registers at once
  static constexpr int kRows = Bytes == 64 ? 16 : 8;

  template <int Pairs>
  WX_INLINE static void first(C* x) {
    F v[2 * Pairs];
    for (int i = 0; i < 2 * Pairs; i++) get(v[i], x + i * N);
    for (int p = 0; p < Pairs; p++)
      for (int h = 1; h < 2 * N; h *= 2) {
        F a, b;
        split(a, b, v[2 * p], v[2 * p + 1], std::make_index_sequence<N>());
        v[2 * p] = a + b;
        v[2 * p + 1] = a - b;
      }
    butterflies<2 * Pairs>(v, 2);
    for (int i = 0; i < 2 * Pairs; i++) put(x + i * N, v[i]);
  }

  template <int R>
  WX_INLINE static void butterflies(F* v, int from) {
#pragma GCC unroll 4
    for (int h = from; h < R; h *= 2)
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        if (i & h) continue;
        const F a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
  }

  // The stages h, 2 h, .., R h / 2.
  template <int R>
  WX_INLINE static void rows(C* x, int64_t length, int64_t h) {
    for (int64_t base = 0; base < length; base += R * h)
      for (int64_t c = base; c < base + h; c += N) {
        F v[R];
        for (int i = 0; i < R; i++) get(v[i], x + c + i * h);
        butterflies<R>(v, 1);
        for (int i = 0; i < R; i++) put(x + c + i * h, v[i]);
      }
  }

  template <int Pairs>
  WX_INLINE static void firsts(C* x, int64_t length, Ahead ahead) {
    for (int64_t at = 0; at < length; at += 2 * N * Pairs) {
      ahead.ask(at, 2 * N * Pairs, ahead.item);
      first<Pairs>(x + at);
    }
  }

  // The stages from h on; h is at least N.
  WX_INLINE static void rest(C* x, int64_t length, int64_t h) {
    while (h < length) {
      const int64_t left = length / h;
      if (kRows >= 16 && left >= 16) {
        rows<kRows>(x, length, h);
        h *= kRows;
      } else if (left >= 8) {
        rows<8>(x, length, h);
        h *= 8;
      } else if (left >= 4) {
        rows<4>(x, length, h);
        h *= 4;
      } else {
        rows<2>(x, length, h);
        h *= 2;
      }
    }
  }

  WX_INLINE static void transform(C* x, int64_t length, Ahead ahead) {
    if (length < 2 * N) {
      for (int64_t h = 1; h < length; h *= 2)
        for (int64_t j = 0; j < length; j++) {
          if (j & h) continue;
          const C a = x[j], b = x[j + h];
          x[j] = a + b;
          x[j + h] = a - b;
        }
      return;
    }
    int64_t h = 2 * N;
    if (length >= 2 * N * kPairs) {
      firsts<kPairs>(x, length, ahead);
      h *= kPairs;
    } else {
      firsts<1>(x, length, ahead);
    }
    rest(x, length, h);
  }
};

template <class C>
struct HadamardKernel {
  template <int Bytes>
  WX_INLINE static void body(C* x, int64_t length, Ahead ahead) {
    Hadamard<C, Bytes>::transform(x, length, ahead);
  }
};

template <class C>
void hadamard(C* x, int64_t length, Ahead ahead = {}) {
  run<HadamardKernel<C>>(x, length, ahead);
}

}  // namespace wx::sub
