// All gradients, for any number of taps. A warp has a group of filters, kTaps taps (blockIdx.z) and 32 hidden units
// (blockIdx.y), one for each lane; what does not fit in registers is made again, and comes from the cache.
#pragma once
#include "network_backward.cuh"
#include "network_forward.cuh"

namespace wx::gpu::mlp {

constexpr int kAnyConditions = 4;  // at a time

template <class C>
__device__ C from_lane(C x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// dweight [gridDim.y][filters][taps], or null; parts as in network_backward.cuh, for each warp.
template <class C>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 8 ? 2 : 3)
    network_grads_any(const Input grad, const Input weight, const Layers<C> net, C* dweight, C* parts, const Sizes o,
                      const Groups groups) {
  constexpr int N = kAnyConditions;
  const int lane = threadIdx.x % 32, first_tap = static_cast<int>(blockIdx.z) * kTaps;
  const int group = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (group >= groups.count) return;
  const int64_t j = int64_t{blockIdx.y} * 32 + lane, unit = min(j, int64_t{o.hidden} - 1);
  const int own_tap = min(first_tap + lane % kTaps, o.taps - 1);  // for sums that are not over hidden units
  const int64_t begin = groups.begin(group), end = groups.end(group);
  const auto w_at = [&](int64_t f, int q) { return load<C>(weight.data, weight.format, f * o.taps + q); };
  const auto g_at = [&](int b, int64_t f, int p) {
    return load<C>(grad.data, grad.format, b * o.bank() + f * o.taps + p);
  };
  const C* w1 = net.w1 + unit * o.taps;
  const C* w2 = net.w2 + unit;
  const Parts at(o);
  C* part = parts + group * at.size;
  C dw1[kTaps] = {}, dw2[kTaps] = {}, db2 = 0;
  for (int b = 0; b < o.batch; b += N) {
    C dv[N] = {};
#pragma unroll 1
    for (int64_t f = begin; f < end; f++) {
      C u = 0, back[N] = {}, h[N] = {}, over_conditions = 0, residual = 0;
      for (int p0 = 0; p0 < o.taps; p0 += 32) {  // a lane reads one of 32 taps for all
        const int own = min(p0 + lane, o.taps - 1), count = min(32, o.taps - p0);
        const C w = w_at(f, own);
        C g[N];
#pragma unroll
        for (int c = 0; c < N; c++) g[c] = b + c < o.batch ? g_at(b + c, f, own) : C(0);
#pragma unroll 2
        for (int p = 0; p < count; p++) {
          u += w1[p0 + p] * from_lane(w, p);
          const C second = w2[int64_t{p0 + p} * o.hidden];
#pragma unroll
          for (int c = 0; c < N; c++) back[c] += second * from_lane(g[c], p);
        }
      }
      const C own_w = w_at(f, own_tap);
      C own_g[N];
#pragma unroll
      for (int c = 0; c < N; c++) {
        own_g[c] = b + c < o.batch ? g_at(b + c, f, own_tap) : C(0);
        if (b + c >= o.batch) continue;
        const Activated<C> x(u + net.v[int64_t{b + c} * o.hidden + unit], o.activation);
        const C e = j < o.hidden ? back[c] * x.slope : C(0);
        h[c] = x.value;
        dv[c] += e;
        over_conditions += e;
        residual += own_g[c];
      }
      db2 += residual;
      C dw[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; t++) {
        const int p = min(first_tap + t, o.taps - 1);
        dw1[t] += over_conditions * from_lane(own_w, t);
        dw[t] = over_conditions * w1[p] + (o.residual && blockIdx.y == 0 && lane == t ? residual : C(0));
#pragma unroll
        for (int c = 0; c < N; c++) dw2[t] += from_lane(own_g[c], t) * h[c];
      }
      if (!dweight) continue;
      const Kept kept = sum_lanes<kTaps, 32>(dw);
      if (!kept.count || first_tap + kept.first >= o.taps) continue;
      C& to = dweight[blockIdx.y * o.bank() + f * o.taps + first_tap + kept.first];
      to = b ? to + dw[0] : dw[0];
    }
#pragma unroll
    for (int c = 0; c < N; c++)
      if (b + c < o.batch && j < o.hidden && first_tap == 0) part[int64_t{b + c} * o.hidden + j] = dv[c];
  }
#pragma unroll
  for (int t = 0; t < kTaps; t++) {
    const int64_t p = first_tap + t;
    if (p >= o.taps || j >= o.hidden) continue;
    part[at.w1 + j * o.taps + p] = dw1[t];
    part[at.w2 + p * o.hidden + j] = dw2[t];
  }
  if (blockIdx.y == 0 && lane < kTaps && first_tap + lane < o.taps) part[at.b2 + own_tap] = db2;
}

}  // namespace wx::gpu::mlp
