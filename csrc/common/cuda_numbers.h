// The numbers of tensors as kernels of formats.cuh take them.
#pragma once
#include "cuda_tensors.h"
#include "formats.cuh"

namespace wx::gpu {

inline Input input_of(const Tensor& t) { return {t.data_ptr(), format_of(t.scalar_type())}; }
inline Output output_of(const Tensor& t) { return {t.data_ptr(), format_of(t.scalar_type())}; }

// No data where an output is not wanted.
inline Output output_if(bool wanted, const Tensor& t) {
  return wanted ? output_of(t) : Output{nullptr, Format::kFloat};
}

template <class C>
C* numbers_of(const Tensor& t) {
  return static_cast<C*>(t.data_ptr());
}
template <class C>
C* numbers_if(bool wanted, const Tensor& t) {
  return wanted ? numbers_of<C>(t) : nullptr;
}

// f(C{}) for a tensor of float or double.
template <class F>
void with_compute(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace wx::gpu
