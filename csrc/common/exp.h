// e^x on vectors, to about one rounding: x = n ln 2 + r with |r| <= ln(2) / 2, then a Taylor polynomial in r and 2^n by
// its bits. NaN stays NaN. x counts as at least kLow, at most kHigh: in float e^-87.3 = 1.2e-38 and e^88.3 = 2.2e38, a
// little inside the range of normal numbers.
#pragma once
#include "simd.h"

namespace wx {

template <class C>
struct ExpParts;
template <>
struct ExpParts<float> {
  static constexpr int kDegree = 7, kFraction = 23, kBias = 127;
  static constexpr float kLow = -87.3f, kHigh = 88.3f, kRound = 0x1.8p23f;
  static constexpr float kLn2 = 0.693145751953125f, kLn2Rest = 1.4286068203094172e-06f;
};
template <>
struct ExpParts<double> {
  static constexpr int kDegree = 13, kFraction = 52, kBias = 1023;
  static constexpr double kLow = -708.3, kHigh = 709.4, kRound = 0x1.8p52;
  static constexpr double kLn2 = 0.69314718036912381649, kLn2Rest = 1.9082149292705877e-10;
};

// e^x = power + power rest, power = 2^n, rest = e^r - 1: so that e^x - 1 is exact near 0 as well.
template <class C, int Bytes>
WX_INLINE void exp_parts(const typename Packs<C, Bytes>::F& at, typename Packs<C, Bytes>::F& power,
                         typename Packs<C, Bytes>::F& rest) {
  using F = typename Packs<C, Bytes>::F;
  using U = typename Packs<C, Bytes>::U;
  using E = ExpParts<C>;
  F low, high, n, magic, ln2, ln2_rest, inverse;
  fill(low, E::kLow), fill(high, E::kHigh), fill(magic, E::kRound), fill(inverse, static_cast<C>(1.4426950408889634));
  fill(ln2, -E::kLn2), fill(ln2_rest, -E::kLn2Rest);
  F x = at < low ? low : at;
  x = x > high ? high : x;
  n = x * inverse + magic;  // n in the lowest bits
  const U bits = reinterpret_cast<U>(n);
  n = n - magic;
  fma<Bytes>(x, n, ln2);
  fma<Bytes>(x, n, ln2_rest);
  power = reinterpret_cast<F>((bits << E::kFraction) +
                              (static_cast<typename Packs<C, Bytes>::Bits>(E::kBias) << E::kFraction));
  double factorial = 1;
  for (int k = 2; k <= E::kDegree; k++) factorial *= k;
  fill(rest, static_cast<C>(1 / factorial));
  each<E::kDegree - 1>([&](auto k) WX_ALWAYS {  // Horner: 1/(d - 1)! ... 1/1!, the last times r
    factorial /= E::kDegree - k;
    F next;
    fill(next, static_cast<C>(1 / factorial));
    fma<Bytes>(next, rest, x);
    rest = next;
  });
  rest = rest * x;
}

}  // namespace wx
