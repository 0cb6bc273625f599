// The weights of a call on the CPU, checked, and the work on them.
#pragma once
#include <optional>
#include <utility>
#include <vector>

#include "../common/layout.h"
#include "../common/work.h"
#include "backward.h"
#include "forward.h"

namespace wx::sn {

inline void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "spectral_norm: ", what); }

inline double scalar(const Tensor& gain) {
  double value = 0;
  check(gain.numel() == 1 && is_float(gain.scalar_type()), "gain must hold one floating-point number");
  dispatch(gain.scalar_type(),
           [&](auto t) { value = static_cast<double>(widen(*static_cast<const decltype(t)*>(gain.data_ptr()))); });
  return value;
}

inline void check_weights(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims) {
  check(weights.size() == dims.size(), "weights and dims must be equally many");
  for (size_t i = 0; i < weights.size(); i++) {
    check(is_float(weights[i].scalar_type()), "weights must be float64, float32, bfloat16 or float16");
    check(weights[i].scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
    check(weights[i].is_cpu(), "weights must be on the CPU");
    check(0 <= dims[i] && dims[i] < weights[i].dim(), "dim is out of range");
  }
}

// Sizes of u and v together, and sigma.
inline int64_t state_size(const Tensor& weight, int64_t dim) {
  int64_t w = 1;
  for (int64_t i = 0; i < weight.dim(); i++) w *= i == dim ? 1 : weight.size(i);
  return weight.size(dim) + w + 1;
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a, const Dims& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// What the forward ops take.
struct Members {
  std::vector<Tensor> weights, us, vs, gains;
  std::vector<int64_t> dims, n_iters;
  Options options;
  ScalarType dtype, result;
  std::vector<int64_t> offsets{};  // of a member's state
  int64_t total = 0, out_bytes = 0;

  Members(std::vector<Tensor> weights_in, std::vector<Tensor> us_in, std::vector<Tensor> vs_in,
          std::vector<Tensor> gains_in, std::vector<int64_t> dims_in, std::vector<int64_t> n_iters_in,
          Options options_in, std::optional<ScalarType> out_dtype)
      : weights(std::move(weights_in)),
        us(std::move(us_in)),
        vs(std::move(vs_in)),
        gains(std::move(gains_in)),
        dims(std::move(dims_in)),
        n_iters(std::move(n_iters_in)),
        options(options_in) {
    check(!weights.empty(), "weights must not be empty");
    check_weights(weights, dims);
    check(us.size() == weights.size() && vs.size() == weights.size() && n_iters.size() == weights.size() &&
              (gains.empty() || gains.size() == weights.size()),
          "us, vs, n_iters and gains must be as many as weights");
    dtype = weights[0].scalar_type();
    result = out_dtype.value_or(dtype);
    const ScalarType compute = opmath(dtype);
    check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
    for (size_t i = 0; i < weights.size(); i++) {
      const int64_t size = state_size(weights[i], dims[i]);
      offsets.push_back(total);
      total += size;
      out_bytes += weights[i].numel() * itemsize(result);
      check(us[i].scalar_type() == compute && vs[i].scalar_type() == compute && us[i].is_cpu() && vs[i].is_cpu(),
            "u and v must be on the CPU, float64 for float64 weights, else float32");
      check(us[i].numel() == weights[i].size(dims[i]) && us[i].numel() + vs[i].numel() + 1 == size,
            "u must have as many elements as the weight along dim, and v as many as along the other axes");
      check(n_iters[i] >= 0, "n_iter must not be negative");
    }
  }

  // The forward of member i, whose weight is `w`; what it reads besides must be packed. No `out`: the state alone.
  template <class T, class O>
  Forward<T, O> forward(size_t i, const Tensor& w, const Tensor& u, const Tensor& v, const Tensor& state,
                        const Tensor* out) const {
    using C = Compute<T>;
    return {static_cast<const T*>(w.data_ptr()),
            out ? static_cast<O*>(out->data_ptr()) : nullptr,
            Layout(w, dims[i]),
            static_cast<const C*>(u.data_ptr()),
            static_cast<const C*>(v.data_ptr()),
            static_cast<C*>(state.data_ptr()) + offsets[i],
            gains.empty() ? 1.0 : scalar(gains[i]),
            n_iters[i],
            options,
            out_bytes > kPastCache};
  }
};

// In which dtype gradients are read: their own where there is a kernel for it, else that of the weights.
inline ScalarType incoming_dtype(const std::vector<Tensor>& douts, ScalarType dtype) {
  const ScalarType first = douts[0].scalar_type();
  for (const Tensor& t : douts)
    if (t.scalar_type() != first) return dtype;
  const bool half = first == ScalarType::BFloat16 || first == ScalarType::Half;
  return dtype == ScalarType::Float && half ? first : dtype;
}

// f(G{}, T{}): the storage types of gradients and weights.
template <class F>
void dispatch_backward(ScalarType incoming, ScalarType dtype, const F& f) {
  if (incoming == dtype)
    dispatch(dtype, [&](auto t) { f(t, t); });
  else if (incoming == ScalarType::BFloat16)
    f(bf16{}, float{});
  else
    f(fp16{}, float{});
}

}  // namespace wx::sn
