// Spectral normalization on CUDA: from tensors to kernels.cuh. Weights are read in contiguous order; one that lies
// otherwise in memory costs a copy.
#include "../common/cuda_shims.h"
#include "kernels.cuh"

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace wx::gpu::sn {
namespace {

using torch::stable::contiguous;

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "spectral_norm: ", what); }

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

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

// A result with the shape and the order in memory of `weight`; kernels fill `target`, which is contiguous.
struct Result {
  Tensor tensor, target;

  Result(const Tensor& weight, ScalarType dtype) : tensor(like(weight, dtype)), target(tensor) {
    if (!tensor.is_contiguous()) target = empty(weight, {weight.sizes().begin(), weight.sizes().end()}, dtype);
  }
  Tensor get() {
    if (target.data_ptr() != tensor.data_ptr()) torch::stable::copy_(tensor, target);
    return tensor;
  }

 private:
  static Tensor like(const Tensor& weight, ScalarType dtype) {
    using torch::stable::detail::from;
    const std::optional<ScalarType> type = dtype;
    std::array<StableIValue, 6> stack{from(weight),       from(type),         from(std::nullopt),
                                      from(std::nullopt), from(std::nullopt), from(std::nullopt)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
};

// A weight in contiguous order as [a, m, b]; as the transposed matrix where that has the rows side by side.
struct View {
  Matrix s{1, 1, 1};
  bool swapped;
  int64_t u_size;

  View(const Tensor& weight, int64_t dim) {
    for (int64_t i = 0; i < weight.dim(); i++) (i < dim ? s.a : i == dim ? s.m : s.b) *= weight.size(i);
    u_size = s.m;
    swapped = s.a > 1 && s.b == 1;
    if (swapped) s = {1, s.a, s.m};
  }
  int64_t v_size() const { return swapped ? s.m : s.columns(); }
  int64_t state_size() const { return u_size + v_size() + 1; }
};

void check_weights(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims) {
  check(!weights.empty() && weights.size() == dims.size(), "weights and dims must be equally many, at least one");
  for (size_t i = 0; i < weights.size(); i++) {
    check(on_device(weights[i]), "weights must be CUDA tensors");
    check(is_float(weights[i].scalar_type()), "weights must be float64, float32, bfloat16 or float16");
    check(weights[i].scalar_type() == weights[0].scalar_type() &&
              weights[i].get_device_index() == weights[0].get_device_index(),
          "weights must have one dtype and one device");
    check(0 <= dims[i] && dims[i] < weights[i].dim(), "dim is out of range");
  }
}

void check_vector(const Tensor& t, const Tensor& weight, int64_t size, const char* what) {
  check(on_device(t) && t.get_device_index() == weight.get_device_index() && t.numel() == size &&
            t.scalar_type() == opmath(weight.scalar_type()),
        what);
}

// gain in the dtype of the state, or none.
std::optional<Tensor> gain_of(const std::optional<Tensor>& gain, const Tensor& weight) {
  if (!gain) return std::nullopt;
  check(on_device(*gain) && gain->numel() == 1, "gain must hold one number, on the device of the weight");
  return torch::stable::to(*gain, opmath(weight.scalar_type()));
}

void copy_into(Tensor& state, int64_t offset, const Tensor& from) {
  Tensor part = torch::stable::narrow(state, 0, offset, from.numel());
  torch::stable::copy_(part, torch::stable::view(from, {from.numel()}));
}

// out of one weight; its state goes to state[at:].
Tensor forward_one(const Tensor& weight, const Tensor& u_in, const Tensor& v_in, const std::optional<Tensor>& gain_in,
                   int64_t dim, const Options& options, ScalarType out_dtype, Tensor& state, int64_t at,
                   cudaStream_t stream) {
  const View view(weight, dim);
  const ScalarType compute = opmath(weight.scalar_type());
  const Tensor u = contiguous(u_in), v = contiguous(v_in);
  check_vector(u, weight, view.u_size, "u must have the weight's size along dim, float64 for float64 else float32");
  check_vector(v, weight, view.v_size(), "v must have the size of the other axes, float64 for float64 else float32");
  check(options.n_iter >= 0, "n_iter must not be negative");
  check(is_float(out_dtype), "out_dtype must be float64, float32, bfloat16 or float16");
  Result out(weight, out_dtype);
  if (weight.numel() == 0) {
    copy_into(state, at, u);
    copy_into(state, at + view.u_size, v);
    Tensor sigma = torch::stable::narrow(state, 0, at + view.state_size() - 1, 1);
    torch::stable::zero_(sigma);
    return out.get();
  }
  const Tensor w = contiguous(weight);
  const std::optional<Tensor> gain = gain_of(gain_in, weight);
  const Plan plan(view.s);
  Tensor numbers = empty(weight, {plan.numbers()}, compute), sums = empty(weight, {kSums}, ScalarType::Double);
  dispatch(weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    dispatch(out_dtype, [&](auto o) {
      using O = decltype(o);
      C *new_u = data<C>(state) + at, *new_v = new_u + view.u_size;
      const C *old_u = data<C>(u), *old_v = data<C>(v);
      const bool swap = view.swapped;
      const Forward<T, O> f{data<T>(w),
                            data<O>(out.target),
                            plan,
                            swap ? old_v : old_u,
                            swap ? old_u : old_v,
                            swap ? new_v : new_u,
                            swap ? new_u : new_v,
                            new_v + view.v_size(),
                            gain ? data<C>(*gain) : nullptr,
                            options,
                            options.v_first != swap,
                            data<C>(numbers),
                            data<double>(sums)};
      f.run(stream);
    });
  });
  check_launches();
  return out.get();
}

// dweight of one weight, whose state is state[at:]; dgain goes to dgains[index].
Tensor backward_one(const Tensor& dout, const Tensor& weight, const Tensor& state, int64_t at,
                    const std::optional<Tensor>& gain_in, int64_t dim, std::optional<double> bound, Tensor& dgains,
                    int64_t index, cudaStream_t stream) {
  const View view(weight, dim);
  const ScalarType dtype = weight.scalar_type(), compute = opmath(dtype);
  check(on_device(dout) && dout.get_device_index() == weight.get_device_index() && dout.dim() == weight.dim() &&
            std::equal(dout.sizes().begin(), dout.sizes().end(), weight.sizes().begin()),
        "dout must have the shape and the device of the weight");
  check(at >= 0 && at + view.state_size() <= state.numel(), "offset is out of range");
  Result dweight(weight, dtype);
  if (weight.numel() == 0) {
    Tensor dgain = torch::stable::narrow(dgains, 0, index, 1);
    torch::stable::zero_(dgain);
    return dweight.get();
  }
  const Tensor w = contiguous(weight);
  const Tensor g = contiguous(dout.scalar_type() == dtype ? dout : torch::stable::to(dout, compute));
  const std::optional<Tensor> gain = gain_of(gain_in, weight);
  const Plan plan(view.s);
  Tensor sums = empty(weight, {kSums}, ScalarType::Double);
  const auto run = [&](auto in, auto t) {
    using G = decltype(in);
    using T = decltype(t);
    using C = Compute<T>;
    const C *u = data<C>(state) + at, *v = u + view.u_size;
    const Backward<G, T> f{
        data<G>(g),           data<T>(w),           data<T>(dweight.target), plan,
        view.swapped ? v : u, view.swapped ? u : v, v + view.v_size(),       gain ? data<C>(*gain) : nullptr,
        bound.value_or(1),    bound.has_value(),    data<C>(dgains) + index, data<double>(sums)};
    f.run(stream);
  };
  dispatch(dtype, [&](auto t) {
    if (g.scalar_type() == dtype)
      run(t, t);
    else
      run(Compute<decltype(t)>{}, t);
  });
  check_launches();
  return dweight.get();
}

std::optional<Tensor> member(const std::vector<Tensor>& gains, size_t i) {
  return gains.empty() ? std::nullopt : std::optional<Tensor>(gains[i]);
}

std::tuple<std::vector<Tensor>, Tensor> forward_list(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                     std::vector<Tensor> vs, std::vector<Tensor> gains,
                                                     std::vector<int64_t> dims, std::vector<int64_t> n_iters,
                                                     double eps, bool v_first, std::optional<double> bound,
                                                     std::optional<ScalarType> out_dtype) {
  check_weights(weights, dims);
  check(us.size() == weights.size() && vs.size() == weights.size() && n_iters.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "us, vs, n_iters and gains must be as many as weights");
  const OnDeviceOf device(weights[0]);
  const ScalarType dtype = weights[0].scalar_type();
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); i++) total += View(weights[i], dims[i]).state_size();
  Tensor state = empty(weights[0], {total}, opmath(dtype));
  std::vector<Tensor> outs;
  int64_t at = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const Options options{n_iters[i], eps, v_first, bound.value_or(1), bound.has_value()};
    outs.push_back(forward_one(weights[i], us[i], vs[i], member(gains, i), dims[i], options, out_dtype.value_or(dtype),
                               state, at, device.stream()));
    at += View(weights[i], dims[i]).state_size();
  }
  return {outs, state};
}

std::vector<Tensor> backward_into(const std::vector<Tensor>& douts, const std::vector<Tensor>& weights,
                                  const Tensor& state, const std::vector<int64_t>& offsets,
                                  const std::vector<Tensor>& gains, const std::vector<int64_t>& dims,
                                  std::optional<double> bound, Tensor& dgains, cudaStream_t stream) {
  check_weights(weights, dims);
  check(douts.size() == weights.size() && offsets.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "douts, offsets and gains must be as many as weights");
  check_vector(state, weights[0], state.numel(), "state must be what the forward returned");
  const Tensor flat = contiguous(state);
  std::vector<Tensor> dweights;
  for (size_t i = 0; i < weights.size(); i++)
    dweights.push_back(backward_one(douts[i], weights[i], flat, offsets[i], member(gains, i), dims[i], bound, dgains,
                                    static_cast<int64_t>(i), stream));
  return dweights;
}

std::tuple<std::vector<Tensor>, Tensor> backward_list(std::vector<Tensor> douts, std::vector<Tensor> weights,
                                                      Tensor state, std::vector<int64_t> offsets,
                                                      std::vector<Tensor> gains, std::vector<int64_t> dims,
                                                      std::optional<double> bound) {
  const OnDeviceOf device(state);
  Tensor dgains = empty(state, {static_cast<int64_t>(weights.size())}, state.scalar_type());
  auto dweights = backward_into(douts, weights, state, offsets, gains, dims, bound, dgains, device.stream());
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
  const OnDeviceOf device(state);
  Tensor dgain = empty(state, {}, state.scalar_type());
  Tensor flat = torch::stable::view(dgain, {1});
  auto dweights = backward_into({dout}, {weight}, state, {0}, list_of(gain), {dim}, bound, flat, device.stream());
  return {dweights[0], dgain};
}

}  // namespace
}  // namespace wx::gpu::sn

WX_CUDA_LIBRARY(m) {
  m.impl("spectral_norm_fwd", TORCH_BOX(&wx::gpu::sn::forward));
  m.impl("spectral_norm_bwd", TORCH_BOX(&wx::gpu::sn::backward));
  m.impl("spectral_norm_fwd_list", TORCH_BOX(&wx::gpu::sn::forward_list));
  m.impl("spectral_norm_bwd_list", TORCH_BOX(&wx::gpu::sn::backward_list));
}
