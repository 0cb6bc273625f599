// From sums of squares to unit vectors, sigma and the factor of the weight; reference.py has the maths.
#pragma once
#include "member.cuh"

namespace wx::gpu::sn {

constexpr int kNoExponent = -(1 << 20);  // of zeros

// 2^k; 0 where that is too small.
__device__ inline void power(int k, float& out) { out = k < -126 ? 0.0f : bit_cast<float>((k + 127) << 23); }
__device__ inline void power(int k, double& out) {
  out = k < -1022 ? 0.0 : bit_cast<double>(static_cast<int64_t>(k + 1023) << 52);
}
template <class C>
__device__ C power_of_two(int k) {
  C x;
  power(k, x);
  return x;
}

// The power of two that brings numbers of this size near one. Sizes whose products with W stay in range are left alone.
template <class C>
__device__ int exponent_of(double largest) {
  if (!(largest > 0) || largest - largest != 0) return kNoExponent;
  const int exponent = static_cast<int>(bit_cast<int64_t>(largest) >> 52) - 1023, most = sizeof(C) == 4 ? 120 : 1000;
  return max(-most, min(most, exponent));
}
constexpr int kSafeExponent = 32;

__device__ inline double total(const double* parts, int n) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) sum += parts[i];
  return block_sum<kThreads>(sum);
}

// What a vector of that length is divided by; NaN stays NaN.
__device__ inline double at_least(double length, double eps) { return length < eps ? eps : length; }

// What t and z of an iteration are multiplied with to have unit length, and sigma. All threads must make it.
struct Lengths {
  double t = 1, z = 1, sigma = 0;

  __device__ Lengths() {}

  template <class T>
  __device__ Lengths(const Forward<T>& f, const Work<Compute<T>>& work, int iteration, double eps, bool only_first) {
    const int parity = iteration % 2, tiles = f.cut.tiles();
    const bool fused = f.cut.fused(f.x_first);
    double t2 = 0, z2 = 0;
    if (f.x_first || !only_first) {
      z2 = total(work.z2 + parity * tiles, f.cut.z_parts() > 1 ? f.cut.gather_blocks(f.cut.columns()) : tiles);
    }
    if (!f.x_first || !only_first) {
      t2 = total(work.t2 + parity * tiles, f.cut.t_parts() > 1 ? f.cut.gather_blocks(f.cut.m) : tiles);
    }
    const double first = sqrt(f.x_first ? z2 : t2), second = sqrt(f.x_first ? t2 : z2);
    const double unit = at_least(first, eps);
    t = z = 1 / unit;
    if (only_first) return;
    double scale = 1;
    if (fused) {  // the second came from the first before that had unit length, and was divided by 2^exponent
      const int exponent = *work.exponent;
      scale = power_of_two<double>(exponent == kNoExponent ? 0 : exponent) / unit;
    }
    const double length = scale * second, divisor = at_least(length, eps);
    if (f.x_first)
      t = scale / divisor;
    else
      z = scale / divisor;
    sigma = length * (length / divisor);
  }
};

// s(sigma) and s'(sigma) of reference.py.
struct Scale {
  double s = 1, ds = 0;
  __device__ Scale(double sigma, double bound, bool bounded) {
    const double c = bounded ? bound : 1.0;
    if (sigma != sigma || (bounded ? sigma > c : sigma != 0)) {
      s = c / sigma;
      ds = -c / (sigma * sigma);
    }
  }
};

// A vector of one of the sides of W: numbers times a factor. With `inner`, number c = o inner + i is at i outer + o;
// columns then fit in 32 bits, Layout sees to that.
template <class C>
struct Vector {
  const C* p;
  C factor;
  uint32_t inner, outer;
  int64_t shift;

  __device__ C operator[](int64_t c) const {
    c += shift;
    if (inner) {
      const uint32_t o = static_cast<uint32_t>(c) / inner;
      c = (static_cast<uint32_t>(c) - o * inner) * outer + o;
    }
    return p[c] * factor;
  }
};

template <class C>
__device__ Vector<C> turned(const C* p, int64_t inner, int64_t columns, int64_t shift) {
  if (inner == 0) return {p + shift, 1, 0, 0, 0};
  return {p, 1, static_cast<uint32_t>(inner), static_cast<uint32_t>(columns) / static_cast<uint32_t>(inner), shift};
}

}  // namespace wx::gpu::sn
