// Spectral normalization on CUDA: from tensors to kernels.cuh. Everything is checked before anything is allocated.
#include "../common/cuda_shims.h"
#include "../common/cuda_tensors.h"
#include "kernels.cuh"
#include "layout.cuh"

#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace wx::gpu::sn {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "spectral_norm: ", what); }

// WEIGHTXFORM_CUDA_PATH=phases|resident, for tests and benchmarks.
Path forced_path() {
  static const Path path = [] {
    const char* name = std::getenv("WEIGHTXFORM_CUDA_PATH");
    if (!name || !*name) return Path::kAuto;
    check(!std::strcmp(name, "phases") || !std::strcmp(name, "resident"),
          "WEIGHTXFORM_CUDA_PATH must be phases or resident");
    return name[0] == 'p' ? Path::kPhases : Path::kResident;
  }();
  return path;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// `t` in that dtype and with the order in memory of `like`, which is dense.
Tensor arranged(const Tensor& t, const Tensor& like, ScalarType dtype) {
  if (t.scalar_type() == dtype && same_strides(t, like)) return t;
  Tensor copy = empty_like(like, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// A weight as kernels read it, and a result of the same order in memory. `result` gets the strides that empty_like
// gives.
struct Arranged {
  Tensor weight, result, target;
  Layout layout;

  Arranged(const Tensor& t, int64_t dim, std::optional<ScalarType> dtype)
      : weight(t), layout(sizes_of(t), strides_of(t), dim) {
    if (dtype) target = result = empty_like(t, *dtype);
    if (t.numel() == 0 || layout.supported) return;
    weight = torch::stable::contiguous(t);
    layout = Layout(sizes_of(weight), strides_of(weight), dim);
    if (dtype && !result.is_contiguous()) target = empty(t, sizes_of(t), *dtype);
  }
  void deliver() {
    if (target.data_ptr() != result.data_ptr()) torch::stable::copy_(result, target);
  }
};

int64_t u_size(const Tensor& weight, int64_t dim) { return weight.size(dim); }
int64_t v_size(const Tensor& weight, int64_t dim) {
  int64_t n = 1;
  for (int64_t i = 0; i < weight.dim(); i++) n *= i == dim ? 1 : weight.size(i);
  return n;
}
int64_t state_size(const Tensor& weight, int64_t dim) { return u_size(weight, dim) + v_size(weight, dim) + 1; }

void check_weights(const Tensors& weights, const Integers& dims) {
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

void check_gains(const Tensors& gains, const Tensors& weights) {
  for (const Tensor& gain : gains)
    check(on_device(gain) && gain.get_device_index() == weights[0].get_device_index() && gain.numel() == 1 &&
              is_float(gain.scalar_type()),
          "gain must hold one number, on the device of the weight");
}

// Gains as the kernels read them; `held` keeps what was converted.
template <class C>
const C* gain_of(const Tensors& gains, size_t i, ScalarType compute, Tensors& held) {
  if (gains.empty()) return nullptr;
  if (gains[i].scalar_type() == compute) return static_cast<const C*>(gains[i].data_ptr());
  held.push_back(torch::stable::to(gains[i], compute));
  return static_cast<const C*>(held.back().data_ptr());
}

// The state, and the outs where they are asked for.
Tensor forward_work(const Tensors& weights, const Tensors& us, const Tensors& vs, const Tensors& gains,
                    const Integers& dims, const Integers& n_iters, double eps, bool v_first,
                    std::optional<double> bound, std::optional<ScalarType> out_dtype, Tensors* outs) {
  check_weights(weights, dims);
  check(us.size() == weights.size() && vs.size() == weights.size() && n_iters.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "us, vs, n_iters and gains must be as many as weights");
  check_gains(gains, weights);
  const ScalarType dtype = weights[0].scalar_type(), compute = opmath(dtype), result = out_dtype.value_or(dtype);
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    check_vector(us[i], weights[i], u_size(weights[i], dims[i]),
                 "u must have the weight's size along dim, float64 for float64 else float32");
    check_vector(vs[i], weights[i], v_size(weights[i], dims[i]),
                 "v must have the size of the other axes, float64 for float64 else float32");
    check(n_iters[i] >= 0 && n_iters[i] <= INT32_MAX, "n_iter must not be negative, and fit in 32 bits");
    total += state_size(weights[i], dims[i]);
  }
  const Path path = forced_path();

  const OnDeviceOf device(weights[0]);
  Tensor state = empty(weights[0], {total}, compute);
  std::vector<Arranged> arranged;
  Tensors held;
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Forward<T>> members;
    int64_t at = 0, bytes = 0;
    for (size_t i = 0; i < weights.size(); i++) {
      const int64_t h = u_size(weights[i], dims[i]), width = v_size(weights[i], dims[i]);
      arranged.emplace_back(weights[i], dims[i], outs ? std::optional(result) : std::nullopt);
      const Arranged& a = arranged.back();
      if (weights[i].numel() == 0) {  // nothing moves, sigma is 0
        for (const auto& [from, offset] : {std::pair(us[i], at), std::pair(vs[i], at + h)}) {
          Tensor part = torch::stable::narrow(state, 0, offset, from.numel());
          torch::stable::copy_(part, torch::stable::view(packed(from), {from.numel()}));
        }
        Tensor sigma = torch::stable::narrow(state, 0, at + h + width, 1);
        torch::stable::zero_(sigma);
      } else {
        const bool swapped = a.layout.swapped;
        held.push_back(packed(us[i]));
        const C* u = static_cast<const C*>(held.back().data_ptr());
        held.push_back(packed(vs[i]));
        const C* v = static_cast<const C*>(held.back().data_ptr());
        C *new_u = static_cast<C*>(state.data_ptr()) + at, *new_v = new_u + h;
        Forward<T> f{};
        f.w = static_cast<const T*>(a.weight.data_ptr());
        f.out = outs ? a.target.data_ptr() : nullptr;
        f.y0 = swapped ? v : u;
        f.x0 = swapped ? u : v;
        f.y = swapped ? new_v : new_u;
        f.x = swapped ? new_u : new_v;
        f.sigma = new_v + width;
        f.gain = gain_of<C>(gains, i, compute, held);
        f.cut = Cut::of(a.layout.a, a.layout.m, a.layout.b, sizeof(T));
        f.inner = a.layout.inner;
        f.n_iter = static_cast<int>(n_iters[i]);
        f.x_first = v_first != swapped;
        members.push_back(f);
        bytes += Work<C>::bytes(f.cut);
      }
      at += h + width + 1;
    }
    if (members.empty()) return;
    const Tensor work = empty(weights[0], {bytes / 8}, ScalarType::Double);
    auto* next = static_cast<unsigned char*>(work.data_ptr());
    for (Forward<T>& f : members) {
      f.work = next;
      next += Work<C>::bytes(f.cut);
    }
    Options options{};
    options.eps = eps;
    options.bound = bound.value_or(1);
    options.bounded = bound.has_value();
    options.out = format_of(result);
    launch_forward(members, options, path, device.stream());
    check_launches();
  });
  if (outs)
    for (Arranged& a : arranged) {
      a.deliver();
      outs->push_back(a.result);
    }
  return state;
}

std::tuple<Tensors, Tensor> forward_list(Tensors weights, Tensors us, Tensors vs, Tensors gains, Integers dims,
                                         Integers n_iters, double eps, bool v_first, std::optional<double> bound,
                                         std::optional<ScalarType> out_dtype) {
  Tensors outs;
  const Tensor state = forward_work(weights, us, vs, gains, dims, n_iters, eps, v_first, bound, out_dtype, &outs);
  return {outs, state};
}

Tensor state_list(Tensors weights, Tensors us, Tensors vs, Integers dims, Integers n_iters, double eps, bool v_first) {
  return forward_work(weights, us, vs, {}, dims, n_iters, eps, v_first, std::nullopt, std::nullopt, nullptr);
}

// In which dtype gradients are read: as they come where all are alike and there is a kernel for it.
ScalarType gradient_dtype(const Tensors& douts, ScalarType dtype) {
  const ScalarType first = douts[0].scalar_type(), compute = opmath(dtype);
  bool alike = true;
  for (const Tensor& dout : douts) alike = alike && dout.scalar_type() == first;
  if (alike && (first == dtype || (first != ScalarType::Double && dtype == ScalarType::Float))) return first;
  return compute;
}

Tensors backward_into(const Tensors& douts, const Tensors& weights, const Tensor& state, const Integers& offsets,
                      const Tensors& gains, const Integers& dims, std::optional<double> bound, Integers dgain_shape,
                      Tensor& dgains) {
  check_weights(weights, dims);
  check(douts.size() == weights.size() && offsets.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "douts, offsets and gains must be as many as weights");
  check_vector(state, weights[0], state.numel(), "state must be what the forward returned");
  check_gains(gains, weights);
  for (size_t i = 0; i < weights.size(); i++) {
    check(on_device(douts[i]) && douts[i].get_device_index() == weights[i].get_device_index() &&
              is_float(douts[i].scalar_type()) && sizes_of(douts[i]) == sizes_of(weights[i]),
          "dout must have the shape and the device of the weight");
    check(offsets[i] >= 0 && offsets[i] + state_size(weights[i], dims[i]) <= state.numel(), "offset is out of range");
  }
  const Path path = forced_path();

  const OnDeviceOf device(state);
  const ScalarType dtype = weights[0].scalar_type(), compute = opmath(dtype), incoming = gradient_dtype(douts, dtype);
  const Tensor flat = packed(state);
  dgains = empty(state, dgain_shape, compute);
  std::vector<Arranged> arranged;
  Tensors held, dweights;
  const auto run_as = [&](auto g, auto t) {
    using G = decltype(g);
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Backward<G, T>> members;
    int64_t pieces = 0;
    for (size_t i = 0; i < weights.size(); i++) {
      arranged.emplace_back(weights[i], dims[i], dtype);
      const Arranged& a = arranged.back();
      if (weights[i].numel() == 0) {
        Tensor all = torch::stable::view(dgains, {dgains.numel()});
        Tensor dgain = torch::stable::narrow(all, 0, static_cast<int64_t>(i), 1);
        torch::stable::zero_(dgain);
        continue;
      }
      held.push_back(wx::gpu::sn::arranged(douts[i], a.weight, incoming));
      const int64_t h = u_size(weights[i], dims[i]), width = v_size(weights[i], dims[i]);
      const C *u = static_cast<const C*>(flat.data_ptr()) + offsets[i], *v = u + h;
      Backward<G, T> f{};
      f.g = static_cast<const G*>(held.back().data_ptr());
      f.w = static_cast<const T*>(a.weight.data_ptr());
      f.dw = static_cast<T*>(a.target.data_ptr());
      f.y = a.layout.swapped ? v : u;
      f.x = a.layout.swapped ? u : v;
      f.sigma = v + width;
      f.gain = gain_of<C>(gains, i, compute, held);
      f.dgain = static_cast<C*>(dgains.data_ptr()) + i;
      f.m = a.layout.m;
      f.b = a.layout.b;
      f.numel = weights[i].numel();
      f.inner = a.layout.inner;
      f.columns = a.layout.a * a.layout.b;
      f.piece = Backward<G, T>::piece_of(f.numel);
      members.push_back(f);
      pieces += f.pieces();
    }
    if (members.empty()) return;
    const Tensor sums = empty(state, {pieces}, ScalarType::Double);
    auto* next = static_cast<double*>(sums.data_ptr());
    for (Backward<G, T>& f : members) {
      f.sums = next;
      next += f.pieces();
    }
    launch_backward(members, BackwardOptions{bound.value_or(1), bound.has_value(), 0}, path, device.stream());
    check_launches();
  };
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    if (incoming == dtype) return run_as(t, t);
    if constexpr (std::is_same_v<T, float>) return incoming == ScalarType::Half ? run_as(fp16{}, t) : run_as(bf16{}, t);
    if constexpr (!std::is_same_v<T, float> && !std::is_same_v<T, double>) return run_as(float{}, t);
  });
  for (Arranged& a : arranged) {
    a.deliver();
    dweights.push_back(a.result);
  }
  return dweights;
}

std::tuple<Tensors, Tensor> backward_list(Tensors douts, Tensors weights, Tensor state, Integers offsets, Tensors gains,
                                          Integers dims, std::optional<double> bound) {
  Tensor dgains;
  const auto n = static_cast<int64_t>(weights.size());
  Tensors dweights = backward_into(douts, weights, state, offsets, gains, dims, bound, {n}, dgains);
  return {dweights, dgains};
}

Tensors list_of(const std::optional<Tensor>& gain) { return gain ? Tensors{*gain} : Tensors{}; }

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor u, Tensor v, std::optional<Tensor> gain, int64_t dim,
                                   int64_t n_iter, double eps, bool v_first, std::optional<double> bound,
                                   std::optional<ScalarType> out_dtype) {
  auto [outs, state] = forward_list({weight}, {u}, {v}, list_of(gain), {dim}, {n_iter}, eps, v_first, bound, out_dtype);
  return {outs[0], state};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor weight, Tensor state, std::optional<Tensor> gain, int64_t dim,
                                    std::optional<double> bound) {
  Tensor dgain;
  Tensors dweights = backward_into({dout}, {weight}, state, {0}, list_of(gain), {dim}, bound, {}, dgain);
  return {dweights[0], dgain};
}

}  // namespace
}  // namespace wx::gpu::sn

WX_CUDA_LIBRARY(m) {
  m.impl("spectral_norm_fwd", TORCH_BOX(&wx::gpu::sn::forward));
  m.impl("spectral_norm_bwd", TORCH_BOX(&wx::gpu::sn::backward));
  m.impl("spectral_norm_fwd_list", TORCH_BOX(&wx::gpu::sn::forward_list));
  m.impl("spectral_norm_bwd_list", TORCH_BOX(&wx::gpu::sn::backward_list));
  m.impl("spectral_norm_state_list", TORCH_BOX(&wx::gpu::sn::state_list));
}
