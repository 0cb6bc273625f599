// What is drawn from Philox: sign bits, block permutations, coins; the counters are those of
// weightxform/subspace/philox.py.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/philox.h"
#include "simd.h"

namespace wx::sub {

enum Stream : uint32_t { kSetup = 1, kPerm, kSignIn, kSignOut, kEntry, kFfB, kFfG, kFfPerm };

WX_INLINE Words draw(Key key, Stream stream, int64_t pos, uint32_t column, uint32_t step) {
  return philox(key, static_cast<uint32_t>(pos), stream << 24 | static_cast<uint32_t>(pos >> 32), column, step);
}

// The products of the lower halves of 64-bit lanes: what vectors have an instruction for, and compilers do not find.
template <int Bytes, class V>
WX_INLINE void multiply_low(V& product, const V& a, const V& b) {
#if defined(__x86_64__) && defined(__gnu_linux__)
  if constexpr (Bytes > 16)
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
  else
    product = reinterpret_cast<V>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  product = (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// N draws at once, word w of draw l in out[w][l]: either N positions, or one position and N columns. A word stands in
// the lower half of a 64-bit lane; what is in the upper half does not matter.
template <int N, int Bytes>
WX_INLINE void draw_lanes(Key key, Stream stream, int64_t pos, uint32_t column, uint32_t step, bool along_columns,
                          uint32_t (*out)[N]) {
  using V = typename Pack<uint64_t, Bytes>::V;
  constexpr int kLanes = Bytes / 8, kAtOnce = Bytes == 64 ? 4 : 2;
  const V a = V{} + 0xD2511F53u, b = V{} + 0xCD9E8D57u;
  for (int first = 0; first < N; first += kAtOnce * kLanes) {
    alignas(64) uint64_t counters[4][kAtOnce * kLanes];
    for (int i = 0; i < kAtOnce * kLanes; i++) {
      const auto l = static_cast<uint64_t>(first + i), at = static_cast<uint64_t>(pos) + (along_columns ? 0 : l);
      counters[0][i] = at;
      counters[1][i] = (at >> 32) | (static_cast<uint64_t>(stream) << 24);
      counters[2][i] = along_columns ? column + l : column;
      counters[3][i] = step;
    }
    V c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
    for (int k = 0; k < kAtOnce; k++) {
      get(c0[k], counters[0] + k * kLanes);
      get(c1[k], counters[1] + k * kLanes);
      get(c2[k], counters[2] + k * kLanes);
      get(c3[k], counters[3] + k * kLanes);
    }
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; round++) {
#pragma GCC unroll 4
      for (int k = 0; k < kAtOnce; k++) {
        V p, q;
        multiply_low<Bytes>(p, a, c0[k]);
        multiply_low<Bytes>(q, b, c2[k]);
        c0[k] = (q >> 32) ^ c1[k] ^ k0;
        c2[k] = (p >> 32) ^ c3[k] ^ k1;
        c1[k] = q;
        c3[k] = p;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    using Half = typename Pack<uint32_t, Bytes / 2>::V;
#pragma GCC unroll 4
    for (int k = 0; k < kAtOnce; k++) {
      const int at = first + k * kLanes;
      put(out[0] + at, __builtin_convertvector(c0[k], Half));
      put(out[1] + at, __builtin_convertvector(c1[k], Half));
      put(out[2] + at, __builtin_convertvector(c2[k], Half));
      put(out[3] + at, __builtin_convertvector(c3[k], Half));
    }
  }
}

// Sign bits of 4096 elements, from 4096 `chunk` on: 128 words.
struct SignChunk {
  template <int Bytes>
  WX_INLINE static void body(Key key, Stream stream, int64_t chunk, uint32_t column, uint32_t step, uint32_t* words) {
    alignas(64) uint32_t out[4][32];
    draw_lanes<32, Bytes>(key, stream, chunk * 32, column, step, false, out);
    for (int l = 0; l < 32; l++)
      for (int w = 0; w < 4; w++) words[4 * l + w] = out[w][l];
  }
};

// The sign bits around the elements [start, start + count) of a tensor; kept, because tiles that follow need them too.
class Signs {
 public:
  static constexpr int64_t kChunk = 4096;

  // Words whose bit 0 of the first is the sign of element `start`, a multiple of 32.
  const uint32_t* of(Key key, Stream stream, uint32_t column, uint32_t step, int64_t start, int64_t count,
                     int64_t numel) {
    const int64_t chunk = start / kChunk, end = (start + count + kChunk - 1) / kChunk;
    const bool same = chunk >= from_ && end <= to_ && key.k0 == key_.k0 && key.k1 == key_.k1 && column == column_;
    if (!same) {
      key_ = key, column_ = column, from_ = chunk, to_ = end;
      words_.resize((end - chunk) * kChunk / 32);
      if (numel <= 1024)
        for (int64_t k = 0; k * 128 < numel; k++) {
          const Words w = draw(key, stream, k, column, step);
          for (int i = 0; i < 4; i++) words_[4 * k + i] = w.at[i];
        }
      else
        for (int64_t k = chunk; k < end; k++)
          run<SignChunk>(key, stream, k, column, step, words_.data() + (k - chunk) * kChunk / 32);
    }
    return words_.data() + (start - from_ * kChunk) / 32;
  }

 private:
  Key key_{};
  uint32_t column_ = 0;
  int64_t from_ = 0, to_ = -1;
  std::vector<uint32_t> words_;
};

// The bijection v = pi(j) of a block of 2^m places, and its inverse; m <= 16 where the type is uint16_t.
struct Permutation {
  uint32_t a0, a1, a2, k;
  int m;

  Permutation(const Words& w, int bits) : a0(w.at[0] | 1), a1(w.at[1] | 1), a2(w.at[2] | 1), k(w.at[3]), m(bits) {}

  WX_INLINE int shift() const { return (m + 1) >> 1; }
  WX_INLINE uint32_t mask() const { return (uint32_t{1} << m) - 1; }
  WX_INLINE uint32_t operator()(uint32_t j) const {
    uint32_t x = ((j + k) * a0) & mask();
    x ^= x >> shift();
    x = (x * a1) & mask();
    x ^= x >> shift();
    return (x * a2) & mask();
  }
  static uint32_t inverse(uint32_t a) {  // mod 2^32, Newton; a is right to 3 bits
    uint32_t x = a;
    for (int i = 0; i < 5; i++) x *= 2 - a * x;
    return x;
  }
};

// pi(j), or j for v = 0, 1, ... (the inverse), as 16-bit numbers; length is at most 2^15. The m bits of a place stand
// at the top of a lane, so that products need no mask, and the first product is a sum from vector to vector.
struct Places {
  template <int Bytes>
  WX_INLINE static void body(Permutation pi, bool inverse, uint16_t* out, int64_t length) {
    using V = typename Pack<uint16_t, Bytes>::V;
    constexpr int N = Bytes / 2;
    if (length == 1) {
      out[0] = 0;
      return;
    }
    const int up = 16 - pi.m, shift = pi.shift();
    const auto top = [up](uint32_t a) { return static_cast<uint16_t>(a << up); };
    const uint32_t first = inverse ? Permutation::inverse(pi.a2) : pi.a0;
    const auto second = static_cast<uint16_t>(inverse ? Permutation::inverse(pi.a1) : pi.a1);
    const auto third = static_cast<uint16_t>(inverse ? Permutation::inverse(pi.a0) : pi.a2);
    const uint16_t after = inverse ? top(pi.k) : uint16_t{0}, step = top(N * first);
    const V bits = V{} + top(pi.mask());
    V at, x;
    for (int l = 0; l < N; l++) at[l] = top((l + (inverse ? 0 : pi.k)) * first);
    for (int64_t j = 0; j < length; j += N, at += step) {  // writes up to N - 1 more than length
      x = at ^ ((at >> shift) & bits);
      x *= second;
      x ^= (x >> shift) & bits;
      x = (x * third - after) >> up;
      put(out + j, x);
    }
  }
};

WX_INLINE int32_t coins(uint32_t word) {
  uint32_t x = word >> 1;
  x = x - ((x >> 1) & 0x55555555u);
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  x = (x + (x >> 4)) & 0x0F0F0F0Fu;
  return 2 * static_cast<int32_t>((x * 0x01010101u) >> 24) - 31;
}

}  // namespace wx::sub
