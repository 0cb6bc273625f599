// The torch side of what the projections have in common: checks, and outputs.
#pragma once
#include <vector>

#include "call.h"

namespace wx::sub {

inline void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "subspace: ", what); }

// One number for all elements: an expanded scalar.
inline bool same_everywhere(const Tensor& t) {
  if (t.numel() < 2) return false;
  const Dims sizes = to_dims(t.sizes()), strides = to_dims(t.strides());
  for (size_t i = 0; i < sizes.size(); i++)
    if (sizes[i] != 1 && strides[i] != 0) return false;
  return true;
}

inline void check_z(const Tensor& z, const std::vector<Tensor>& theta0) {
  check(z.is_cpu() && (z.dim() == 1 || z.dim() == 2), "z must be [d] or [K, d], on the CPU");
  check(theta0.empty() || z.scalar_type() == opmath(theta0[0].scalar_type()),
        "z must be float64 for float64 tensors, else float32");
}

// Outputs with the strides that empty_like gives; a kernel writes contiguous ones, `settle` moves the others.
class Outputs {
 public:
  Outputs(const std::vector<Tensor>& theta0, const Tensor& z) {
    for (const Tensor& t : theta0) {
      Dims sizes = to_dims(t.sizes());
      const bool plain = z.dim() == 2 || t.is_contiguous() || same_everywhere(t);
      if (z.dim() == 2) sizes.insert(sizes.begin(), z.size(0));
      Dims strides(sizes.size());
      int64_t step = 1;
      for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= std::max<int64_t>(sizes[i], 1);
      if (z.dim() == 1 && t.is_contiguous()) strides = to_dims(t.strides());  // of axes of one element: any
      written.push_back(allocate(sizes, strides, t.scalar_type()));
      final.push_back(plain ? written.back() : torch::stable::empty_like(t));
    }
  }
  int64_t bytes() const {
    int64_t sum = 0;
    for (const Tensor& t : written) sum += t.numel() * itemsize(t.scalar_type());
    return sum;
  }
  void settle() {
    for (size_t i = 0; i < final.size(); i++)
      if (final[i].data_ptr() != written[i].data_ptr()) torch::stable::copy_(final[i], written[i]);
  }
  std::vector<Tensor> written, final;
};

}  // namespace wx::sub
