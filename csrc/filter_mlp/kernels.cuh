// The network over each filter on a GPU; reference.py has the maths. Nothing of the size of the hidden layer is stored.
//
//   forward    the weight (once for each few conditions), the output written: one launch
//   backward   G read once for each 64 hidden units (with unusual taps for each 32, and for each 8 taps); the weight
//              read and written; parts of the sums, for each of at most 528 groups of filters as many numbers as dv,
//              dw1 and dw2 have: two launches; a third adds dweight up where there are more than 64 hidden units (or
//              unusual taps)
//
// With H units the arithmetic is 2 H K products for each number of K forward, 4 H K backward: from about 20 units on it
// takes longer than memory.
#pragma once
#include "../common/taps.cuh"
#include "network_any.cuh"

namespace wx::gpu::mlp {

template <class C>
void launch_network(const Input& weight, const Layers<C>& net, const Output& out, const Sizes& o, cudaStream_t stream) {
  const bool done = for_taps<C, 3, 4, 9, 25>(o.taps, [&](auto k) {
    constexpr int K = decltype(k)::value, N = kAtOnce<K>;
    const int n = o.batch == 1 ? 1 : o.batch <= N / 2 ? N / 2 : N;
    const auto kernel = n == 1 ? network<K, 1> : n == N ? network<K, N> : network<K, N / 2>;
    const int64_t blocks = ceil_div<int64_t>(o.filters, kThreads) * ceil_div(o.batch, n);
    WX_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, stream, weight, net, out, o);
  });
  if (done) return;
  const int64_t blocks = ceil_div<int64_t>(o.filters, 32) * o.batch * ceil_div(o.taps, kWarps * kTaps);
  WX_LAUNCH(network_any<C>, static_cast<unsigned>(blocks), kThreads, stream, weight, net, out, o);
}

// How a backward is cut: by the sizes alone.
struct Cut {
  bool usual;  // the kernel of network_backward.cuh, which sums in float32
  int chunks;  // of hidden units; each leaves a part of dweight
  Groups groups;

  template <class C>
  __host__ static Cut of(const Sizes& o) {
    const bool usual = for_taps<C, 3, 4, 9>(o.taps, [](auto) {});
    if (!usual) return {false, ceil_div(o.hidden, 32), Groups::of(o.filters, 1, kMostGroups / 2)};
    return {true, o.hidden <= 32 ? 1 : ceil_div(o.hidden, 64), Groups::of(o.filters, kTile, kMostGroups)};
  }
  bool weight_in_parts() const { return !usual || chunks > 1; }
};

// dweight.data is null where it is not wanted; weight_parts [chunks][filters][taps] where it comes in parts.
template <class C>
void launch_network_grads(const Input& grad, const Input& weight, const Layers<C>& net, const Output& dweight,
                          C* weight_parts, C* parts, const Targets<4>& sums, const Sizes& o, cudaStream_t stream) {
  const Cut cut = Cut::of<C>(o);
  const Output to = weight_parts ? Output{weight_parts, kFormatOf<C>} : dweight;
  for_taps<C, 3, 4, 9>(o.taps, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto kernel = o.hidden <= 16   ? network_grads<K, 16, 1>
                        : o.hidden <= 32 ? network_grads<K, 32, 1>
                                         : network_grads<K, 32, 2>;
    const dim3 grid(cut.groups.count, cut.chunks);
    WX_LAUNCH(kernel, grid, kThreads, stream, grad, weight, net, to, parts, o, cut.groups);
  });
  if (!cut.usual) {
    const dim3 grid(ceil_div(cut.groups.count, kWarps), cut.chunks, ceil_div(o.taps, kTaps));
    WX_LAUNCH(network_grads_any<C>, grid, kThreads, stream, grad, weight, net, weight_parts, parts, o, cut.groups);
  }
  launch_add_parts(parts, cut.groups.count, sums, stream);
  if (weight_parts) launch_add_parts(weight_parts, cut.chunks, dweight, o.bank(), stream);
}

}  // namespace wx::gpu::mlp
