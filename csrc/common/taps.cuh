// Kernels for numbers of taps that are known when they are compiled.
#pragma once
#include <type_traits>
#include <utility>

namespace wx::gpu {

// f(K) where `taps` is one of Ks and the sums are float32; whether it is.
template <class C, int... Ks, class F>
bool for_taps(int taps, const F& f) {
  if constexpr (std::is_same_v<C, float>)
    return ((taps == Ks && (f(std::integral_constant<int, Ks>{}), true)) || ...);
  else
    return false;
}

}  // namespace wx::gpu
