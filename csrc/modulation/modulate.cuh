// Modulated filters on a GPU; reference.py has the maths. A block has a filter bank row W[o], all its input channels
// and taps, and goes through the samples, kSamples at a time; with G the size of the output, what moves:
//
//   forward    the weight (twice, the second time from the cache), 1 G written: one launch
//   backward   1 G read; the weight read and written; parts of dstyle, 2 / K of G for each output channel of a block,
//              written and read, which the cache of a large GPU holds: two launches
#pragma once
#include <cmath>

#include "../common/parts.cuh"

#ifndef WX_MOD_THREADS
#define WX_MOD_THREADS 256
#endif
#ifndef WX_MOD_GROUPS
#define WX_MOD_GROUPS 264
#endif

namespace wx::gpu::mod {

constexpr int kThreads = WX_MOD_THREADS;
constexpr int kSamples = kThreads / 32;     // at a time: a warp has one of them
constexpr int kMostGroups = WX_MOD_GROUPS;  // of output channels: two for each of 132 multiprocessors
constexpr int kWantedBlocks = 4 * 132;      // where samples can be split as well
constexpr int kPadded = kThreads * 3 / 2;   // numbers of a tile, with a channel every K + 1 numbers where K is even
template <class C>                          // of shared memory that are left for what a block keeps of its row
constexpr int kRowBytes = (47 << 10) - (kSamples + 1) * kPadded * static_cast<int>(sizeof(C));

struct Sizes {
  int samples, outputs, inputs, taps;

  __host__ __device__ int row() const { return inputs * taps; }
  __host__ __device__ int rounds() const { return (samples + kSamples - 1) / kSamples; }
  __host__ __device__ int64_t bank() const { return int64_t{outputs} * row(); }
  __device__ int64_t of(int sample, int output) const { return (int64_t{sample} * outputs + output) * row(); }
};

// The number of a row that a thread has in each tile: tiles are whole channels, or, of very long ones, parts of them.
struct Tile {
  int taps, channels, c, p;  // of a tile; the thread's own channel and tap
  int first_channel = 0, first_tap = 0;
  int inputs, row_taps;

  __device__ explicit Tile(const Sizes& o)
      : taps(max(1, min(o.taps, kThreads))), channels(kThreads / taps), inputs(o.inputs), row_taps(o.taps) {
    c = static_cast<int>(threadIdx.x) / taps;
    p = static_cast<int>(threadIdx.x) - c * taps;
  }
  __device__ int stride() const { return taps | 1; }
  __device__ int place() const { return c * stride() + p; }
  __device__ int channel() const { return first_channel + c; }
  __device__ int number() const { return channel() * row_taps + first_tap + p; }
  __device__ bool live() const { return c < channels && channel() < inputs && first_tap + p < row_taps; }
  __device__ bool more() const { return first_channel < inputs; }
  __device__ void next() {
    first_tap += taps;
    if (first_tap < row_taps) return;
    first_tap = 0;
    first_channel += channels;
  }
  // The sum over taps of channel `at` of the tile.
  template <class C>
  __device__ C sum(const C* numbers, int at) const {
    const int n = min(taps, row_taps - first_tap);
    C sum = 0;
    for (int begin = 0; begin < n; begin += 16) {  // short sums first: the two terms of dstyle may nearly cancel
      C part = 0;
      for (int i = begin; i < min(begin + 16, n); i++) part += numbers[at * stride() + i];
      sum += part;
    }
    return sum;
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 8 ? 2 : 4)
    modulate(const Input weight, const C* style, const Output out, C* d, const Sizes o, bool demodulate, C eps) {
  using std::sqrt;
  __shared__ C sums[kThreads / 32][kSamples], factors[kSamples];
  const int output = static_cast<int>(divide(blockIdx.x, o.rounds()));
  const int first = (static_cast<int>(blockIdx.x) - output * o.rounds()) * kSamples,
            count = min(o.samples - first, kSamples);
  const int64_t begin = int64_t{output} * o.row();
  const C* styles = style + int64_t{first} * o.inputs;
  if (demodulate) {
    C sum[kSamples] = {};
    for (Tile tile(o); tile.more(); tile.next()) {
      if (!tile.live()) continue;
      const C w = load<C>(weight.data, weight.format, begin + tile.number());
#pragma unroll
      for (int n = 0; n < kSamples; n++) {
        const C s = n < count ? styles[n * o.inputs + tile.channel()] : C(0);
        sum[n] += (s * s) * (w * w);
      }
    }
    const Kept kept = sum_lanes<kSamples, 32>(sum);
    if (kept.count) sums[threadIdx.x / 32][kept.first] = sum[0];
    __syncthreads();
  }
  if (const int n = threadIdx.x; n < kSamples) {
    C sum = eps;
    for (int i = 0; demodulate && i < kThreads / 32; i++) sum += sums[i][n];
    factors[n] = demodulate ? 1 / sqrt(sum) : C(1);
    if (n < count) d[int64_t{first + n} * o.outputs + output] = factors[n];
  }
  __syncthreads();
  C factor[kSamples];
#pragma unroll
  for (int n = 0; n < kSamples; n++) factor[n] = factors[n];
  out.write([&](auto* to) {
    for (Tile tile(o); tile.more(); tile.next()) {
      if (!tile.live()) continue;
      const C w = load<C>(weight.data, weight.format, begin + tile.number());
#pragma unroll
      for (int n = 0; n < kSamples; n++)
        if (n < count)
          narrow(w * (factor[n] * styles[n * o.inputs + tile.channel()]), to[o.of(first + n, output) + tile.number()]);
    }
  });
}

// dweight and parts [groups][samples][inputs] are null where they are not wanted. row: for each block row() + inputs
// numbers of scratch memory, or null where shared memory has them.
template <class C>
struct Gradients {
  Output dweight;
  C *parts, *row;
  int each;    // output channels of a block
  int rounds;  // and its samples, kSamples at a time
};

template <class C>
__global__ void __launch_bounds__(kThreads, 2)
    modulate_grads(const Input grad, const Input weight, const C* style, const C* d, const Gradients<C> to,
                   const Sizes o, bool demodulate) {
  WX_DYNAMIC_SHARED(raw);
  __shared__ C products[kSamples + 1][kPadded];  // of G and w, for each sample; of w and w
  __shared__ C factors[kSamples], pulls[kSamples];
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  C* row = to.row ? to.row + block * (o.row() + o.inputs) : reinterpret_cast<C*>(raw);
  C* energy = row + o.row();
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32;
  const int group = blockIdx.x, first_output = group * to.each, end_output = min(o.outputs, first_output + to.each);
  const int begin = static_cast<int>(blockIdx.y) * to.rounds * kSamples;
  const int end = min(o.samples, begin + to.rounds * kSamples);
  for (int output = first_output; output < end_output; output++) {
    const int64_t in_weight = int64_t{output} * o.row();
    const auto weight_at = [&](int i) { return load<C>(weight.data, weight.format, in_weight + i); };
    for (int first = begin; first < end; first += kSamples) {
      const int count = min(end - first, kSamples), sample = first + own;
      const C* styles = style + int64_t{first} * o.inputs;
      const C* own_style = style + int64_t{min(sample, end - 1)} * o.inputs;
      C* part = to.parts ? to.parts + (int64_t{group} * o.samples + min(sample, end - 1)) * o.inputs : nullptr;
      const C own_d = own < count ? d[int64_t{sample} * o.outputs + output] : C(0);
      if (lane == 0) factors[own] = own_d;
      C pull = 0;  // b, then d^3 b
      C w = 0, g[kSamples] = {};
      const auto fetch = [&](const Tile& tile) {
        if (!tile.live()) return;
        w = weight_at(tile.number());
        grad.read([&](const auto* from) {
#pragma unroll
          for (int n = 0; n < kSamples; n++)
            if (n < count) g[n] = static_cast<C>(widen(from[o.of(first + n, output) + tile.number()]));
        });
      };
      Tile tile(o);
      fetch(tile);
      while (tile.more()) {
        __syncthreads();  // the sums of the tile before are made
        if (tile.live()) {
          C sum = 0;
#pragma unroll
          for (int n = 0; n < kSamples; n++) {
            products[n][tile.place()] = g[n] * w;
            if (to.dweight.data && n < count) sum += g[n] * (factors[n] * styles[n * o.inputs + tile.channel()]);
          }
          if (first == begin) products[kSamples][tile.place()] = w * w;
          if (to.dweight.data) row[tile.number()] = first == begin ? sum : row[tile.number()] + sum;
        }
        __syncthreads();
        const Tile now = tile;
        tile.next();
        if (tile.more()) fetch(tile);
        for (int c = lane; c < now.channels && now.first_channel + c < o.inputs; c += 32) {
          const int i = now.first_channel + c;
          if (own == 0 && first == begin && demodulate) {
            const C sum = now.sum(products[kSamples], c);
            energy[i] = now.first_tap ? energy[i] + sum : sum;
          }
          if (own >= count) continue;
          const C a = now.sum(products[own], c);
          pull += own_style[i] * a;
          if (to.parts) part[i] = output == first_output && now.first_tap == 0 ? own_d * a : part[i] + own_d * a;
        }
      }
      for (int offset = 16; offset; offset /= 2) pull += __shfl_xor_sync(0xffffffffu, pull, offset);
      pull *= own_d * own_d * own_d;
      if (lane == 0) pulls[own] = pull;
      __syncthreads();
      if (to.parts && demodulate && own < count)
        for (int i = lane; i < o.inputs; i += 32) part[i] -= own_style[i] * pull * energy[i];
      if (!to.dweight.data) continue;
      to.dweight.write([&](auto* dweight) {
        for (Tile tile(o); tile.more(); tile.next()) {
          if (!tile.live()) continue;
          C sum = row[tile.number()], against = 0;
#pragma unroll
          for (int n = 0; n < kSamples; n++) {
            const C s = n < count ? styles[n * o.inputs + tile.channel()] : C(0);
            against += pulls[n] * (s * s);
          }
          if (demodulate) sum -= weight_at(tile.number()) * against;
          if (first + kSamples < end)
            row[tile.number()] = sum;
          else
            narrow(sum, dweight[in_weight + tile.number()]);
        }
      });
    }
  }
}

template <class C>
void launch_modulate(const Input& weight, const C* style, const Output& out, C* d, const Sizes& o, bool demodulate,
                     double eps, cudaStream_t stream) {
  WX_LAUNCH(modulate<C>, static_cast<unsigned>(o.outputs * o.rounds()), kThreads, stream, weight, style, out, d, o,
            demodulate, static_cast<C>(eps));
}

// How the backward is cut; only where no dweight is wanted may blocks share the samples.
struct Cut {
  int each, groups, rounds, splits;
  int64_t row_numbers;  // of scratch memory
  int shared;

  template <class C>
  __host__ static Cut of(const Sizes& o, bool need_weight) {
    Cut cut{};
    cut.each = (o.outputs + kMostGroups - 1) / kMostGroups;
    cut.groups = (o.outputs + cut.each - 1) / cut.each;
    const int sharing = need_weight ? 1 : max(1, kWantedBlocks / cut.groups);
    cut.rounds = (o.rounds() + sharing - 1) / sharing;
    cut.splits = (o.rounds() + cut.rounds - 1) / cut.rounds;
    const int64_t numbers = int64_t{o.row()} + o.inputs, bytes = numbers * static_cast<int64_t>(sizeof(C));
    if (bytes > kRowBytes<C>)
      cut.row_numbers = numbers * cut.groups * cut.splits;
    else
      cut.shared = static_cast<int>(bytes);
    return cut;
  }
};

template <class C>
void launch_modulate_grads(const Input& grad, const Input& weight, const C* style, const C* d, const Output& dweight,
                           C* parts, C* dstyle, C* row, const Sizes& o, const Cut& cut, bool demodulate,
                           cudaStream_t stream) {
  const Gradients<C> to{dweight, parts, row, cut.each, cut.rounds};
  WX_LAUNCH_SHARED(modulate_grads<C>, dim3(cut.groups, cut.splits), kThreads, cut.shared, stream, grad, weight, style,
                   d, to, o, demodulate);
  if (parts) launch_add_parts(parts, cut.groups, Output{dstyle, kFormatOf<C>}, int64_t{o.samples} * o.inputs, stream);
}

}  // namespace wx::gpu::mod
