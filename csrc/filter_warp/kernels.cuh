// Filter warps on a GPU; reference.py has the maths. With G the size of all filters of all conditions, what moves:
//
//   forward    the weight (from the cache once for each split of the conditions), the matrices, 1 G written: one launch
//   backward   1 G read, the weight read and written, and parts of the Gram matrices: K / 256 of G
//              written and read. Two launches; for many taps or banks three, and G is read twice: there the products
//              take longer than memory
#pragma once
#include "../common/taps.cuh"
#include "warp_backward.cuh"
#include "warp_forward.cuh"
#include "warp_products.cuh"

namespace wx::gpu::fw {

// f(K) where there is a kernel for one bank of so many taps, of float32 sums; whether there is.
template <class C, int... Ks, class F>
bool for_one_bank(const Sizes& o, const F& f) {
  return o.banks == 1 && for_taps<C, Ks...>(o.taps, f);
}

template <class C>
void launch_forward(const Input& weight, const C* a, const Output& out, const Sizes& o, cudaStream_t stream) {
  const bool done = for_one_bank<C, 3, 4, 9, 25, 27, 49>(
      o, [&](auto k) { launch_warp_filters<decltype(k)::value>(weight, a, out, o, stream); });
  if (!done) launch_map_filters(weight, a, out, Map::forward(o), stream);
}

// How many parts of da there are.
template <class C>
int count_parts(const Sizes& o) {
  int count = gram_groups(o).count;
  for_one_bank<C, 3, 4, 9>(o, [&](auto) { count = grad_groups(o).count; });
  return count;
}

// dweight and parts are null where they are not wanted.
template <class C>
void launch_backward(const Input& grad, const Input& weight, const C* a, const Output& dweight, C* parts, C* da,
                     const Sizes& o, cudaStream_t stream) {
  const bool done = for_one_bank<C, 3, 4, 9>(
      o, [&](auto k) { launch_filter_grads<decltype(k)::value>(grad, weight, a, dweight, parts, o, stream); });
  if (!done && dweight.data) launch_map_filters(grad, a, dweight, Map::backward(o), stream);
  if (!done && parts) launch_gram_filters(grad, weight, parts, o, stream);
  if (parts) launch_add_parts(parts, count_parts<C>(o), Output{da, kFormatOf<C>}, o.matrices(), stream);
}

}  // namespace wx::gpu::fw
