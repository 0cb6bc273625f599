// Dense tensors on the CPU: their order in memory, and outputs of the same layout.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "checks.h"
#include "pool.h"
#include "vec.h"

// In libtorch from 2.11 on; the build targets 2.10, where the pool stays unused.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                                                int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t,
                                                                const uint8_t*, int64_t, void (*)(void*, void*), void*);

namespace wx {

using Dims = std::vector<int64_t>;

inline Dims to_dims(torch::headeronly::IntHeaderOnlyArrayRef a) { return {a.begin(), a.end()}; }

// Axes from the slowest to the fastest in memory; axes of size 1 keep their place as far as possible.
inline Dims memory_order(const Dims& sizes, const Dims& strides) {
  Dims order(sizes.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return sizes[i] != 1 && sizes[j] != 1 && strides[i] > strides[j]; });
  return order;
}

// Each element once, without gaps, in some order of the axes.
inline bool is_dense(const Dims& sizes, const Dims& strides) {
  Dims axes;
  for (size_t i = 0; i < sizes.size(); i++)
    if (sizes[i] != 1) axes.push_back(static_cast<int64_t>(i));
  std::sort(axes.begin(), axes.end(), [&](int64_t i, int64_t j) { return strides[i] < strides[j]; });
  int64_t expected = 1;
  for (int64_t i : axes) {
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

inline int64_t itemsize(ScalarType t) { return t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2; }

// f<T>(); T is the storage type of `dtype`.
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

// An uninitialised CPU tensor. Large ones come from the pool. WEIGHTXFORM_POISON=1 fills it with NaN (for tests).
inline Tensor allocate(const Dims& sizes, const Dims& strides, ScalarType dtype) {
  static const bool poison = [] {
    const char* on = std::getenv("WEIGHTXFORM_POISON");
    return on && on[0] == '1';
  }();
  int64_t numel = 1;
  for (int64_t s : sizes) numel *= s;
  auto bytes = static_cast<size_t>(numel * itemsize(dtype));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t cpu = aoti_torch_device_type_cpu();
  const auto ndim = static_cast<int64_t>(sizes.size());
  AtenTensorHandle handle = nullptr;
  void* data = torch_from_blob ? Pool::instance().take(bytes) : nullptr;
  if (data) {
    auto free = [](void* p, void*) { Pool::instance().give(p); };
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(data, ndim, sizes.data(), strides.data(), 0, type, cpu, -1, &handle,
                                                  0, nullptr, 0, free, nullptr));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes.data(), strides.data(), type, cpu, -1, &handle));
  }
  Tensor out(handle);
  if (poison) std::memset(out.data_ptr(), 0xFF, bytes);
  return out;
}

// As torch has them: an empty axis counts as one of size 1.
inline Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= std::max<int64_t>(sizes[i], 1);
  return strides;
}

inline Tensor contiguous(const Dims& sizes, ScalarType dtype) {
  return allocate(sizes, contiguous_strides(sizes), dtype);
}

// `t` with its elements in memory as `strides` says: itself where they are so already, else a copy.
inline Tensor with_strides(const Tensor& t, const Dims& strides, ScalarType dtype) {
  const Dims sizes = to_dims(t.sizes()), own = to_dims(t.strides());
  bool same = t.scalar_type() == dtype;
  for (size_t i = 0; i < sizes.size(); i++) same = same && (sizes[i] == 1 || own[i] == strides[i]);
  if (same) return t;
  Tensor copy = allocate(sizes, strides, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t` itself where it is dense, else a dense copy with the layout that empty_like gives.
inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous() || is_dense(to_dims(t.sizes()), to_dims(t.strides()))) return t;
  Tensor copy = torch::stable::empty_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace wx
