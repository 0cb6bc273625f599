// Spectral normalization on the CPU: the ops. forward.h and backward.h have the work on one weight.
//
// Work is cut into blocks whose size depends on the shape alone, and partial sums are added in the order of the blocks:
// the result does not depend on the number of threads.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/layout.h"
#include "../common/work.h"
#include "backward.h"
#include "forward.h"

namespace wx::sn {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "spectral_norm: ", what); }

double scalar(const Tensor& gain) {
  double value = 0;
  check(gain.numel() == 1 && is_float(gain.scalar_type()), "gain must hold one floating-point number");
  dispatch(gain.scalar_type(),
           [&](auto t) { value = static_cast<double>(widen(*static_cast<const decltype(t)*>(gain.data_ptr()))); });
  return value;
}

void check_weights(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims) {
  check(weights.size() == dims.size(), "weights and dims must be equally many");
  for (size_t i = 0; i < weights.size(); i++) {
    check(is_float(weights[i].scalar_type()), "weights must be float64, float32, bfloat16 or float16");
    check(weights[i].scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
    check(weights[i].is_cpu(), "weights must be on the CPU");
    check(0 <= dims[i] && dims[i] < weights[i].dim(), "dim is out of range");
  }
}

// Sizes of u and v together, and sigma.
int64_t state_size(const Tensor& weight, int64_t dim) {
  int64_t w = 1;
  for (int64_t i = 0; i < weight.dim(); i++) w *= i == dim ? 1 : weight.size(i);
  return weight.size(dim) + w + 1;
}

Tensor vector(int64_t n, ScalarType dtype) { return allocate({n}, {1}, dtype); }

// What the forward ops share: checks, then every member's work. `outs` gets the results where there are any to write.
Tensor forward_work(const std::vector<Tensor>& weights, const std::vector<Tensor>& us, const std::vector<Tensor>& vs,
                    const std::vector<Tensor>& gains, const std::vector<int64_t>& dims,
                    const std::vector<int64_t>& n_iters, const Options& options, std::optional<ScalarType> out_dtype,
                    std::vector<Tensor>* outs) {
  check(!weights.empty(), "weights must not be empty");
  check_weights(weights, dims);
  check(us.size() == weights.size() && vs.size() == weights.size() && n_iters.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "us, vs, n_iters and gains must be as many as weights");
  const ScalarType dtype = weights[0].scalar_type(), compute = opmath(dtype), result = out_dtype.value_or(dtype);
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  int64_t total = 0, out_bytes = 0;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < weights.size(); i++) {
    sizes.push_back(state_size(weights[i], dims[i]));
    total += sizes[i];
    out_bytes += weights[i].numel() * itemsize(result);
    check(us[i].scalar_type() == compute && vs[i].scalar_type() == compute && us[i].is_cpu() && vs[i].is_cpu(),
          "u and v must be on the CPU, float64 for float64 weights, else float32");
    check(us[i].numel() == weights[i].size(dims[i]) && us[i].numel() + vs[i].numel() + 1 == sizes[i],
          "u must have as many elements as the weight along dim, and v as many as along the other axes");
    check(n_iters[i] >= 0, "n_iter must not be negative");
  }
  const Tensor state = vector(total, compute);
  std::vector<Tensor> held;
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    dispatch(result, [&](auto o) {
      using O = decltype(o);
      std::vector<Forward<T, O>> work;
      C* at = static_cast<C*>(state.data_ptr());
      for (size_t i = 0; i < weights.size(); i++) {
        const Tensor w = dense(weights[i]), u = packed(us[i]), v = packed(vs[i]);
        if (outs) outs->push_back(allocate(to_dims(w.sizes()), to_dims(w.strides()), result));
        work.push_back({static_cast<const T*>(w.data_ptr()), outs ? static_cast<O*>((*outs)[i].data_ptr()) : nullptr,
                        Layout(w, dims[i]), static_cast<const C*>(u.data_ptr()), static_cast<const C*>(v.data_ptr()),
                        at, gains.empty() ? 1.0 : scalar(gains[i]), n_iters[i], options, out_bytes > kPastCache});
        at += sizes[i];
        held.insert(held.end(), {w, u, v});
      }
      run_all(work);
    });
  });
  return state;
}

std::tuple<std::vector<Tensor>, Tensor> forward_list(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                     std::vector<Tensor> vs, std::vector<Tensor> gains,
                                                     std::vector<int64_t> dims, std::vector<int64_t> n_iters,
                                                     double eps, bool v_first, std::optional<double> bound,
                                                     std::optional<ScalarType> out_dtype) {
  std::vector<Tensor> outs;
  const Tensor state = forward_work(weights, us, vs, gains, dims, n_iters, {eps, v_first, bound}, out_dtype, &outs);
  return {outs, state};
}

Tensor state_list(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs,
                  std::vector<int64_t> dims, std::vector<int64_t> n_iters, double eps, bool v_first) {
  return forward_work(weights, us, vs, {}, dims, n_iters, {eps, v_first, std::nullopt}, std::nullopt, nullptr);
}

std::tuple<std::vector<Tensor>, Tensor> backward_list(std::vector<Tensor> douts, std::vector<Tensor> weights,
                                                      Tensor state, std::vector<int64_t> offsets,
                                                      std::vector<Tensor> gains, std::vector<int64_t> dims,
                                                      std::optional<double> bound) {
  check(!weights.empty(), "weights must not be empty");
  check_weights(weights, dims);
  check(douts.size() == weights.size() && offsets.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "douts, offsets and gains must be as many as weights");
  const ScalarType dtype = weights[0].scalar_type(), compute = opmath(dtype);
  check(state.scalar_type() == compute && state.is_cpu(), "state must be what the forward returned");
  ScalarType incoming = douts[0].scalar_type();
  int64_t out_bytes = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    check(douts[i].is_cpu() && to_dims(douts[i].sizes()) == to_dims(weights[i].sizes()),
          "douts must be on the CPU and have the shapes of the weights");
    check(offsets[i] >= 0 && offsets[i] + state_size(weights[i], dims[i]) <= state.numel(), "offset is out of range");
    if (douts[i].scalar_type() != incoming) incoming = dtype;
    out_bytes += weights[i].numel() * itemsize(dtype);
  }
  const bool half_into_float =
      dtype == ScalarType::Float && (incoming == ScalarType::BFloat16 || incoming == ScalarType::Half);
  if (!half_into_float) incoming = dtype;
  const Tensor flat = packed(state);
  const Tensor dgains = vector(static_cast<int64_t>(weights.size()), compute);
  std::vector<Tensor> dweights, held;
  const auto run = [&](auto g, auto t) {
    using G = decltype(g);
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Backward<G, T>> work;
    for (size_t i = 0; i < weights.size(); i++) {
      const Tensor w = dense(weights[i]), dout = with_strides(douts[i], to_dims(w.strides()), incoming);
      dweights.push_back(allocate(to_dims(w.sizes()), to_dims(w.strides()), dtype));
      work.push_back({static_cast<const G*>(dout.data_ptr()), static_cast<const T*>(w.data_ptr()),
                      static_cast<T*>(dweights[i].data_ptr()), Layout(w, dims[i]),
                      static_cast<const C*>(flat.data_ptr()) + offsets[i], gains.empty() ? 1.0 : scalar(gains[i]),
                      bound, static_cast<C*>(dgains.data_ptr()) + i, out_bytes > kPastCache});
      held.insert(held.end(), {w, dout});
    }
    run_all(work);
  };
  if (incoming == dtype)
    dispatch(dtype, [&](auto t) { run(t, t); });
  else if (incoming == ScalarType::BFloat16)
    run(bf16{}, float{});
  else
    run(fp16{}, float{});
  return {dweights, dgains};
}

std::vector<Tensor> list_of(const std::optional<Tensor>& gain) {
  return gain ? std::vector<Tensor>{*gain} : std::vector<Tensor>{};
}

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor u, Tensor v, std::optional<Tensor> gain, int64_t dim,
                                   int64_t n_iter, double eps, bool v_first, std::optional<double> bound,
                                   std::optional<ScalarType> out_dtype) {
  auto [outs, state] = forward_list({weight}, {u}, {v}, list_of(gain), {dim}, {n_iter}, eps, v_first, bound, out_dtype);
  return {outs[0], state};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor weight, Tensor state, std::optional<Tensor> gain, int64_t dim,
                                    std::optional<double> bound) {
  auto [dweights, dgains] = backward_list({dout}, {weight}, state, {0}, list_of(gain), {dim}, bound);
  const Tensor dgain = allocate({}, {}, dgains.scalar_type());
  std::memcpy(dgain.data_ptr(), dgains.data_ptr(), itemsize(dgains.scalar_type()));
  return {dweights[0], dgain};
}

}  // namespace
}  // namespace wx::sn

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("spectral_norm_fwd", TORCH_BOX(&wx::sn::forward));
  m.impl("spectral_norm_bwd", TORCH_BOX(&wx::sn::backward));
  m.impl("spectral_norm_fwd_list", TORCH_BOX(&wx::sn::forward_list));
  m.impl("spectral_norm_bwd_list", TORCH_BOX(&wx::sn::backward_list));
  m.impl("spectral_norm_state_list", TORCH_BOX(&wx::sn::state_list));
}
