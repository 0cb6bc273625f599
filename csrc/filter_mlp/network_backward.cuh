// All gradients, for filters of 3, 4 or 9 taps. A thread has kOwn hidden units: their weights and the sums of dw1 and
// dw2 stay in its registers, and it reads filters and G, which its neighbours read as well, from shared memory. Only
// dweight is a sum over hidden units, and that over all conditions at once.
#pragma once
#include "network.cuh"

namespace wx::gpu::mlp {

constexpr int kTile = 64;       // filters
constexpr int kConditions = 4;  // of which G is in shared memory at a time

// Parts of the sums: for each group of filters dv [batch][hidden], dw1 [hidden][taps], dw2 [taps][hidden], db2 [taps].
struct Parts {
  int64_t w1, w2, b2, size;  // where they begin

  __host__ __device__ explicit Parts(const Sizes& o)
      : w1(int64_t{o.batch} * o.hidden),
        w2(w1 + int64_t{o.hidden} * o.taps),
        b2(w2 + int64_t{o.hidden} * o.taps),
        size(b2 + o.taps) {}
};

// kLanes threads share a filter. blockIdx.y: the hidden units; dweight is [gridDim.y][filters][taps], or null.
template <int K, int kLanes, int kOwn>
__global__ void __launch_bounds__(kThreads, 3)
    network_grads(const Input grad, const Input weight, const Layers<float> net, const Output dweight, float* parts,
                  const Sizes o, const Groups groups) {
  using C = float;
  constexpr int kSlots = kThreads / kLanes, kWidth = kLanes * kOwn, N = kConditions, kNumbers = kTile * K;
  static_assert(K <= kLanes);
  __shared__ C ws[kNumbers], dws[kNumbers], gs[N][kNumbers], sums[kSlots][N * kWidth];
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes,
            first_unit = static_cast<int>(blockIdx.y) * kWidth;
  const Parts at(o);
  C* part = parts + blockIdx.x * at.size;
  C w1[kOwn][K], w2[kOwn][K], dw1[kOwn][K] = {}, dw2[kOwn][K] = {}, db2 = 0;
#pragma unroll
  for (int k = 0; k < kOwn; k++) {
    const int j = first_unit + lane + k * kLanes;
#pragma unroll
    for (int p = 0; p < K; p++) {
      w1[k][p] = j < o.hidden ? net.w1[int64_t{j} * K + p] : C(0);
      w2[k][p] = j < o.hidden ? net.w2[int64_t{p} * o.hidden + j] : C(0);
    }
  }
  // Of each of `count` values for all units, the sum over the slots: f(which, unit, sum).
  const auto add_slots = [&](int count, const auto& f) {
    for (int i = threadIdx.x; i < count * kWidth; i += kThreads) {
      C sum = sums[0][i];
#pragma unroll
      for (int s = 1; s < kSlots; s++) sum += sums[s][i];
      if (const int j = first_unit + i % kWidth; j < o.hidden) f(i / kWidth, j, sum);
    }
  };
  const int64_t begin = groups.begin(blockIdx.x), end = groups.end(blockIdx.x);
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t first = tile * kNumbers;
    const int n = static_cast<int>(min(o.bank() - first, int64_t{kNumbers}));
    weight.read([&](const auto* from) {
      for (int i = threadIdx.x; i < kNumbers; i += kThreads) {
        ws[i] = i < n ? static_cast<C>(widen(from[first + i])) : C(0);
        dws[i] = 0;
      }
    });
    for (int b = 0; b < o.batch; b += N) {
      const int count = min(N, o.batch - b);
      grad.read([&](const auto* from) {
        for (int c = 0; c < count; c++)
          for (int i = threadIdx.x; i < kNumbers; i += kThreads)
            gs[c][i] = i < n ? static_cast<C>(widen(from[(b + c) * o.bank() + first + i])) : C(0);
      });
      C v[N][kOwn], dv[N][kOwn] = {};
#pragma unroll
      for (int c = 0; c < N; c++)
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
          const int j = min(first_unit + lane + k * kLanes, o.hidden - 1);
          v[c][k] = net.v[int64_t{min(b + c, o.batch - 1)} * o.hidden + j];
        }
      __syncthreads();
#pragma unroll 1
      for (int begin_filter = 0; begin_filter * K < n; begin_filter += kSlots) {
        const int f = (begin_filter + slot) * K;
        C w[K], u[kOwn] = {}, over_conditions[kOwn] = {}, residual = 0;
#pragma unroll
        for (int q = 0; q < K; q++) {
          w[q] = ws[f + q];
#pragma unroll
          for (int k = 0; k < kOwn; k++) u[k] += w1[k][q] * w[q];
        }
#pragma unroll
        for (int c = 0; c < N; c++) {
          if (c >= count) continue;
          C back[kOwn] = {};
#pragma unroll
          for (int p = 0; p < K; p++)
#pragma unroll
            for (int k = 0; k < kOwn; k++) back[k] += w2[k][p] * gs[c][f + p];
          residual += gs[c][f + min(lane, K - 1)];
#pragma unroll
          for (int k = 0; k < kOwn; k++) {
            const Activated<C> h(u[k] + v[c][k], o.activation);
            const C e = back[k] * h.slope;
            dv[c][k] += e;
            over_conditions[k] += e;
#pragma unroll
            for (int p = 0; p < K; p++) dw2[k][p] += gs[c][f + p] * h.value;
          }
        }
        db2 += residual;
        C dw[K];
#pragma unroll
        for (int q = 0; q < K; q++) {
          dw[q] = o.residual && first_unit == 0 && lane == q ? residual : C(0);
#pragma unroll
          for (int k = 0; k < kOwn; k++) {
            dw1[k][q] += over_conditions[k] * w[q];
            dw[q] += over_conditions[k] * w1[k][q];
          }
        }
        if (!dweight.data) continue;
        const Kept kept = sum_lanes<K, kLanes>(dw);
        if (kept.count) dws[f + kept.first] += dw[0];
      }
#pragma unroll
      for (int c = 0; c < N; c++)
#pragma unroll
        for (int k = 0; k < kOwn; k++) sums[slot][c * kWidth + lane + k * kLanes] = dv[c][k];
      __syncthreads();
      add_slots(count, [&](int c, int j, C sum) {
        C& to = part[int64_t{b + c} * o.hidden + j];
        to = tile == begin ? sum : to + sum;
      });
    }
    if (dweight.data)
      dweight.write([&](auto* to) {
        for (int i = threadIdx.x; i < n; i += kThreads) narrow(dws[i], to[blockIdx.y * o.bank() + first + i]);
      });
  }
#pragma unroll
  for (int p = 0; p < K; p++) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOwn; k++) {
      sums[slot][lane + k * kLanes] = dw1[k][p];
      sums[slot][kWidth + lane + k * kLanes] = dw2[k][p];
    }
    __syncthreads();
    add_slots(2, [&](int second, int j, C sum) {
      part[second ? at.w2 + int64_t{p} * o.hidden + j : at.w1 + int64_t{j} * K + p] = sum;
    });
  }
  if (first_unit > 0) return;
  __syncthreads();
  sums[slot][lane] = db2;
  __syncthreads();
  if (slot > 0 || lane >= K) return;
  for (int s = 1; s < kSlots; s++) db2 += sums[s][lane];
  part[at.b2 + lane] = db2;
}

}  // namespace wx::gpu::mlp
