// Tensors as the C++ around CUDA kernels needs them: one function for each dtype, new ones, copies in order.
#pragma once
#include <array>
#include <optional>
#include <vector>

#include "checks.h"
#include "device.cuh"

namespace wx::gpu {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// f(T{}), T being the storage type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      return f(bf16{});
  }
}

inline Format format_of(ScalarType dtype) {
  return dtype == ScalarType::Float    ? Format::kFloat
         : dtype == ScalarType::Double ? Format::kDouble
         : dtype == ScalarType::Half   ? Format::kHalf
                                       : Format::kBfloat;
}

inline Integers sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
inline Integers strides_of(const Tensor& t) { return {t.strides().begin(), t.strides().end()}; }

inline Tensor empty(const Tensor& like, Integers sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  const std::optional<ScalarType> type = dtype;
  std::array<StableIValue, 6> stack{
      from(t), from(type), from(std::nullopt), from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace wx::gpu
