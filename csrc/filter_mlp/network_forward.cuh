// out[b, f, p]. A thread has a filter and its sums for a few conditions; hidden units pass one after the other.
#pragma once
#include "network.cuh"

namespace wx::gpu::mlp {

constexpr int kUnits = 32;  // hidden units in shared memory at a time
template <int K>            // conditions at a time, at the most
constexpr int kAtOnce = K <= 9    ? 8
                        : K <= 27 ? 2
                                  : 1;

// N conditions at a time.
template <int K, int N>
__global__ void __launch_bounds__(kThreads, 3)
    network(const Input weight, const Layers<float> net, const Output out, const Sizes o) {
  using C = float;
  constexpr int kStride = K | 1;
  __shared__ C units[kUnits][2 * K], biases[kUnits][N], tile[kThreads * kStride];
  const int64_t rounds = ceil_div(o.batch, N), index = divide(blockIdx.x, rounds), first = index * kThreads;
  const int begin = static_cast<int>(blockIdx.x - index * rounds) * N;
  const int n = static_cast<int>(min(o.filters - first, int64_t{kThreads})) * K;
  const auto place = [](int i) { return K % 2 ? i : i / K * kStride + i % K; };
  weight.read([&](const auto* from) {
    for (int i = threadIdx.x; i < kThreads * K; i += kThreads)
      tile[place(i)] = i < n ? static_cast<C>(widen(from[first * K + i])) : C(0);
  });
  __syncthreads();
  C w[K], sum[N][K];
#pragma unroll
  for (int p = 0; p < K; p++) {
    w[p] = tile[threadIdx.x * kStride + p];
#pragma unroll
    for (int b = 0; b < N; b++) sum[b][p] = net.b2[p] + (o.residual ? w[p] : C(0));
  }
  for (int j0 = 0; j0 < o.hidden; j0 += kUnits) {
    const int count = min(kUnits, o.hidden - j0);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * K; i += kThreads) {
      units[i / K][i % K] = net.w1[int64_t{j0} * K + i];
      units[i / K][K + i % K] = net.w2[int64_t{i % K} * o.hidden + j0 + i / K];
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count * N; i += kThreads)
      biases[i / N][i % N] = net.v[int64_t{min(begin + i % N, o.batch - 1)} * o.hidden + j0 + i / N];
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < count; j++) {
      C u = 0;
#pragma unroll
      for (int q = 0; q < K; q++) u += units[j][q] * w[q];
#pragma unroll
      for (int b = 0; b < N; b++) {
        const C h = Activated<C>(u + biases[j][b], o.activation).value;
#pragma unroll
        for (int p = 0; p < K; p++) sum[b][p] += units[j][K + p] * h;
      }
    }
  }
#pragma unroll
  for (int b = 0; b < N; b++) {
    if (begin + b >= o.batch) continue;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < K; p++) tile[threadIdx.x * kStride + p] = sum[b][p];
    __syncthreads();
    out.write([&](auto* to) {
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += kThreads)
        narrow(tile[place(i)], to[(begin + b) * o.bank() + first * K + i]);
    });
  }
}

// Any number of taps: a block has 32 filters, one for each lane, and one condition; a warp has kTaps taps, for which it
// waits while all warps make hidden units.
constexpr int kTaps = 8;

template <class C>
__global__ void __launch_bounds__(kThreads, 4)
    network_any(const Input weight, const Layers<C> net, const Output out, const Sizes o) {
  __shared__ C h[kUnits][33];
  const int chunks = ceil_div(o.taps, kWarps * kTaps), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t item = divide(blockIdx.x, chunks), index = divide(item, o.batch), b = item - index * o.batch;
  const int first_tap = (static_cast<int>(blockIdx.x - item * chunks) * kWarps + warp) * kTaps;
  const int64_t f = index * 32 + lane, from = min(f, o.filters - 1) * o.taps;
  C sum[kTaps] = {};
  for (int j0 = 0; j0 < o.hidden; j0 += kUnits) {
    const int count = min(kUnits, o.hidden - j0);
    __syncthreads();
    for (int j = warp; j < count; j += kWarps) {
      const C* row = net.w1 + int64_t{j0 + j} * o.taps;
      C u = 0;
      weight.read([&](const auto* w) {
        for (int q = 0; q < o.taps; q++) u += row[q] * static_cast<C>(widen(w[from + q]));
      });
      h[j][lane] = Activated<C>(u + net.v[b * o.hidden + j0 + j], o.activation).value;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTaps; t++) {
      if (first_tap + t >= o.taps) continue;
      const C* row = net.w2 + int64_t{first_tap + t} * o.hidden + j0;
      for (int j = 0; j < count; j++) sum[t] += row[j] * h[j][lane];
    }
  }
  if (f >= o.filters) return;
#pragma unroll
  for (int t = 0; t < kTaps; t++) {
    const int p = first_tap + t;
    if (p >= o.taps) continue;
    C value = sum[t] + net.b2[p];
    if (o.residual) value += load<C>(weight.data, weight.format, from + p);
    store(out.data, out.format, b * o.bank() + from + p, value);
  }
}

}  // namespace wx::gpu::mlp
