// The sign bits of a projection as masks of vectors.
#pragma once
#include <cstdint>

#include "../common/simd.h"

namespace wx::sub {

// x with its sign flipped where `minus`, also that of 0.
WX_INLINE float flip(float x, bool minus) { return from_bits(to_bits(x) ^ (static_cast<uint32_t>(minus) << 31)); }
WX_INLINE double flip(double x, bool minus) { return minus ? -x : x; }

WX_INLINE bool sign_at(const uint32_t* signs, int64_t e) { return signs[e >> 5] >> (e & 31) & 1; }

// Bits of a word as sign bits of lanes: at(m, word) has those of the bits from `first` on.
template <class C, int Bytes>
struct SignBits {
  using P = Packs<C, Bytes>;
  using U = typename P::U;
  U by;

  SignBits() = default;
  WX_INLINE explicit SignBits(int first) {
    for (int l = 0; l < P::N; l++)
      by[l] = Bytes > 16 ? sizeof(C) * 8 - 1 - (first + l) : typename P::Bits{1} << (first + l);
  }
  WX_INLINE void at(U& m, uint32_t word) const {
    const U sign = U{} + (typename P::Bits{1} << (sizeof(C) * 8 - 1));
    if constexpr (Bytes > 16)
      m = ((U{} + word) << by) & sign;
    else  // SSE2 has no shift of its own for each lane
      m = reinterpret_cast<U>(((U{} + word) & by) == by) & sign;
  }
};

// The same for each vector of 32 numbers: flip(x, word, part) flips the signs of vector `part` as the word says.
template <class C, int Bytes>
struct SignMasks {
  using P = Packs<C, Bytes>;
  static constexpr int kParts = 32 / P::N;
  SignBits<C, Bytes> bits[kParts];

  WX_INLINE SignMasks() {
    for (int part = 0; part < kParts; part++) bits[part] = SignBits<C, Bytes>(part * P::N);
  }
  WX_INLINE void flip(typename P::F& x, uint32_t word, int part) const {
    typename P::U m;
    bits[part].at(m, word);
    x = reinterpret_cast<typename P::F>(reinterpret_cast<typename P::U>(x) ^ m);
  }
};

}  // namespace wx::sub
