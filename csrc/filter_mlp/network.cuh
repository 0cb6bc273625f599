// What the kernels of the network share: sizes, layers, activations; reference.py has the maths and the names.
#pragma once
#include <cmath>

#include "../common/parts.cuh"

#ifndef WX_MLP_THREADS
#define WX_MLP_THREADS 128
#endif
#ifndef WX_MLP_GROUPS
#define WX_MLP_GROUPS 528
#endif

namespace wx::gpu::mlp {

constexpr int kThreads = WX_MLP_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kMostGroups = WX_MLP_GROUPS;  // of filters: four for each of 132 multiprocessors

enum class Activation { relu, silu, tanh };

struct Sizes {
  int64_t filters;
  int batch, hidden, taps;
  Activation activation;
  bool residual;

  __host__ __device__ int64_t bank() const { return filters * taps; }
};

template <class C>
struct Layers {
  const C *v, *w1, *w2, *b2;
};

__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline double expm1_of(double x) { return expm1(x); }
__device__ inline float inverse(float x) { return __fdividef(1.0f, x); }  // 0 for infinity
__device__ inline double inverse(double x) { return 1 / x; }

// h(x), and its derivative. Both of silu and tanh follow from one exponential, so that there is one branch at the most.
template <class C>
struct Activated {
  C value, slope;

  __device__ Activated(C x, Activation activation) {
    if (activation == Activation::relu) {
      value = x < 0 ? C(0) : x;
      slope = x > 0 ? C(1) : C(0);
      return;
    }
    const bool silu = activation == Activation::silu;
    const C power = expm1_of(silu ? -x : x < 0 ? 2 * x : -2 * x), part = inverse(2 + power);
    const C tanh = x < 0 ? power * part : -power * part, by_silu = x * part;
    value = silu ? by_silu : tanh;
    slope = silu ? part + by_silu * (1 - part) : 4 * (1 + power) * (part * part);  // 1 - tanh^2 would cancel
  }
};

}  // namespace wx::gpu::mlp
