// Both gradients of one bank of filters of 3, 4 or 9 taps, in one pass over G. A block has a tile of filters and goes
// through the conditions: a thread keeps a few columns q of its filters (of the weight, and of dweight, which adds up
// over the conditions), and of each number of G makes the products for both. The sums over filters end in a part for
// each group of tiles.
#pragma once
#include "cut.cuh"

namespace wx::gpu::fw {

template <int K>
constexpr int kColumns = K == 9 ? 3 : K;  // of a thread: a warp has them for 32 filters side by side
template <int K>
constexpr int kGradThreads = 32 * (K / kColumns<K>);
constexpr int kGradDeep = 8;  // and for so many one after the other
constexpr int kGradTile = 32 * kGradDeep;
constexpr int kGradBlocks = 4;  // on a multiprocessor, by their registers

// The numbers of a tile of filters in shared memory, a filter every K + 1 numbers where K is even: a warp reads the
// same tap of 32 filters.
template <int K>
struct Staged {
  using C = float;
  static constexpr int kNumbers = kGradTile * K, kOwn = kNumbers / kGradThreads<K>, kStride = K | 1;
  C own[kOwn];  // of a thread, on their way

  __device__ void load(const Input& from, int64_t begin, int n) {
    from.read([&](const auto* p) {
#pragma unroll
      for (int k = 0; k < kOwn; k++) {
        const int i = threadIdx.x + k * kGradThreads<K>;
        own[k] = i < n ? static_cast<C>(widen(p[begin + i])) : C(0);
      }
    });
  }
  __device__ void put(C* to) const {
#pragma unroll
    for (int k = 0; k < kOwn; k++) {
      const int i = threadIdx.x + k * kGradThreads<K>;
      to[K % 2 ? i : i / K * kStride + i % K] = own[k];
    }
  }
};

// kWeight: dweight is wanted. parts [groups][batch][K][K], or null.
template <int K, bool kWeight>
__global__ void __launch_bounds__(kGradThreads<K>, kGradBlocks * 96 / kGradThreads<K>)
    filter_grads(const Input grad, const Input weight, const float* a, const Output dweight, float* parts,
                 const Sizes o, const Groups groups, int conditions) {
  using C = float;
  using S = Staged<K>;
  constexpr int Q = kColumns<K>, R = kGradDeep;
  __shared__ C shared[kGradTile * S::kStride];
  const int slot = threadIdx.x % 32, q = threadIdx.x / 32 * Q, group = blockIdx.x;
  const int begin = static_cast<int>(blockIdx.y) * conditions, end = min(o.batch, begin + conditions);
  for (int64_t tile = groups.begin(group); tile < groups.end(group); tile++) {
    const int64_t first = tile * kGradTile * K;
    const int n = static_cast<int>(min(o.bank() - first, static_cast<int64_t>(S::kNumbers)));
    S next;
    C w[R][Q], dw[R][Q] = {};
    next.load(weight, first, n);
    __syncthreads();
    next.put(shared);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int c = 0; c < Q; c++) w[r][c] = shared[(slot + 32 * r) * S::kStride + q + c];
    next.load(grad, begin * o.bank() + first, n);
    for (int b = begin; b < end; b++) {
      __syncthreads();
      next.put(shared);
      __syncthreads();
      if (b + 1 < end) next.load(grad, (b + 1) * o.bank() + first, n);
      C gram[K * Q] = {};
#pragma unroll
      for (int p = 0; p < K; p++) {
        C row[Q];
        if constexpr (kWeight) {
#pragma unroll
          for (int c = 0; c < Q; c++) row[c] = a[b * o.matrix() + p * K + q + c];
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          const C g = shared[(slot + 32 * r) * S::kStride + p];
#pragma unroll
          for (int c = 0; c < Q; c++) {
            gram[p * Q + c] += g * w[r][c];
            if constexpr (kWeight) dw[r][c] += g * row[c];
          }
        }
      }
      if (!parts) continue;
      const Kept kept = sum_lanes<K * Q, 32>(gram);
      C* to = parts + (group * int64_t{o.batch} + b) * o.matrix() + q;
#pragma unroll
      for (int i = 0; i < (K * Q + 31) / 32; i++) {
        if (i >= kept.count) continue;
        C& sum = to[(kept.first + i) / Q * K + (kept.first + i) % Q];
        sum = tile == groups.begin(group) ? gram[i] : sum + gram[i];
      }
    }
    if constexpr (kWeight) {
      __syncthreads();
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < Q; c++) shared[(slot + 32 * r) * S::kStride + q + c] = dw[r][c];
      __syncthreads();
      dweight.write([&](auto* to) {
        for (int i = threadIdx.x; i < n; i += kGradThreads<K>)
          narrow(shared[K % 2 ? i : i / K * S::kStride + i % K], to[first + i]);
      });
    }
  }
}

inline Groups grad_groups(const Sizes& o) { return Groups::of(o.filters, kGradTile, kMostGroups); }

// `parts` of grad_groups(o), or null where da is not wanted.
template <int K>
void launch_filter_grads(const Input& grad, const Input& weight, const float* a, const Output& dweight, float* parts,
                         const Sizes& o, cudaStream_t stream) {
  const Groups groups = grad_groups(o);
  int64_t splits = 1;  // conditions that blocks share: dweight needs all of them in one
  if (!dweight.data) splits = min(int64_t{o.batch}, max(int64_t{1}, kWantedBlocks / groups.count));
  const auto conditions = static_cast<int>(ceil_div<int64_t>(o.batch, splits));
  const dim3 grid(groups.count, ceil_div(o.batch, conditions));
  const auto kernel = dweight.data ? filter_grads<K, true> : filter_grads<K, false>;
  WX_LAUNCH(kernel, grid, kGradThreads<K>, stream, grad, weight, a, dweight, parts, o, groups, conditions);
}

}  // namespace wx::gpu::fw
