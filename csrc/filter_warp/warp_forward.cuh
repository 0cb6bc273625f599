// out[b, f, p] for one bank of filters of a usual size. A thread makes one tap p of every new filter it has: it holds
// the rows p of the matrices of a few conditions, and reads the taps of a filter, which its neighbours read as well,
// from shared memory. Neighbouring threads write neighbouring numbers.
#pragma once
#include "cut.cuh"

namespace wx::gpu::fw {

constexpr int kThreads = WX_FW_THREADS;
constexpr int kDeepest = 16;  // filters that a thread has, one after the other, at the most
template <int K>
constexpr int kSide = kThreads / K;  // and side by side
template <int K>                     // conditions at a time
constexpr int kRowsHeld = K <= 4    ? 8
                          : K <= 9  ? 4
                          : K <= 27 ? 2
                                    : 1;

template <int K>
__global__ void __launch_bounds__(kSide<K>* K)
    warp_filters(const Input weight, const float* a, const Output out, const Sizes o, int deep, int conditions) {
  using C = float;
  constexpr int N = kRowsHeld<K>, kStep = kSide<K> * K;
  __shared__ C taps[kStep * kDeepest];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStep * deep;
  const int n = static_cast<int>(min(o.bank() - first, static_cast<int64_t>(kStep * deep)));
  const int begin = static_cast<int>(blockIdx.y) * conditions, end = min(o.batch, begin + conditions);
  weight.read([&](const auto* from) {
    for (int i = threadIdx.x; i < n; i += kStep) taps[i] = static_cast<C>(widen(from[first + i]));
  });
  __syncthreads();
  const int p = static_cast<int>(threadIdx.x) % K;
  out.write([&](auto* to) {
    for (int b = begin; b < end; b += N) {
      C row[N][K];
#pragma unroll
      for (int j = 0; j < N; j++) {
        const C* of = a + (min(b + j, end - 1) * o.matrix() + p * K);
#pragma unroll
        for (int q = 0; q < K; q++) row[j][q] = of[q];
      }
      for (int i = threadIdx.x; i < n; i += kStep) {
        const C* x = taps + (i - p);
        C sum[N] = {};
#pragma unroll
        for (int q = 0; q < K; q++) {
#pragma unroll
          for (int j = 0; j < N; j++) sum[j] += row[j][q] * x[q];
        }
#pragma unroll
        for (int j = 0; j < N; j++)
          if (b + j < end) narrow(sum[j], to[(b + j) * o.bank() + first + i]);
      }
    }
  });
}

template <int K>
void launch_warp_filters(const Input& weight, const float* a, const Output& out, const Sizes& o, cudaStream_t stream) {
  constexpr int N = kRowsHeld<K>;
  const int64_t rounds = ceil_div<int64_t>(o.batch, N), side = kSide<K>;
  // Deep tiles read the matrices less often; but the device must have enough blocks.
  const int64_t deep = min(int64_t{kDeepest}, max(int64_t{1}, o.filters * rounds / (side * kWantedBlocks)));
  const int64_t tiles = ceil_div(o.filters, side * deep);
  const int64_t splits = min(min(rounds, max(int64_t{1}, kWantedBlocks / tiles)), int64_t{65535});
  const int64_t conditions = ceil_div(rounds, splits) * N;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div<int64_t>(o.batch, conditions)));
  WX_LAUNCH((warp_filters<K>), grid, kSide<K> * K, stream, weight, a, out, o, static_cast<int>(deep),
            static_cast<int>(conditions));
}

}  // namespace wx::gpu::fw
