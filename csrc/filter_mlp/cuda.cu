// The network over each filter on CUDA: from tensors to kernels.cuh. Everything is checked before anything is
// allocated.
#include "../common/cuda_numbers.h"
#include "../common/cuda_shims.h"
#include "kernels.cuh"

#include <string>

namespace wx::gpu::mlp {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "filter_mlp: ", what); }

Activation activation_of(const std::string& name) {
  check(name == "relu" || name == "silu" || name == "tanh", "activation must be 'relu', 'silu' or 'tanh'");
  return name == "relu" ? Activation::relu : name == "silu" ? Activation::silu : Activation::tanh;
}

Sizes sizes(const Tensor& weight, const Tensor& v, const Tensor& w1, const Tensor& w2, const std::string& activation,
            bool residual) {
  check(on_device(weight) && is_float(weight.scalar_type()) && weight.dim() == 2,
        "weight must be a floating point CUDA tensor [F, K]");
  for (const Tensor& t : {v, w1, w2})
    check(on_device(t) && t.get_device_index() == weight.get_device_index() &&
              t.scalar_type() == opmath(weight.scalar_type()) && t.dim() == 2,
          "v, w1 and w2 must be matrices on the device of weight, float64 for a float64 weight, else float32");
  const int64_t hidden = v.size(1), taps = weight.size(1);
  check(w1.size(0) == hidden && w1.size(1) == taps, "w1 must be [H, K]");
  check(w2.size(0) == taps && w2.size(1) == hidden, "w2 must be [K, H]");
  check(hidden >= 1 && taps >= 1, "there must be a hidden unit and a tap");
  constexpr int64_t kMost = int64_t{1} << 20;
  check(v.size(0) <= kMost && hidden <= kMost && taps <= kMost / 8, "B, H and K must be at most 2^20, 2^20 and 2^17");
  const Sizes o{weight.size(0),         static_cast<int>(v.size(0)), static_cast<int>(hidden),
                static_cast<int>(taps), activation_of(activation),   residual};
  check(o.filters <= int64_t{1} << 40 && ceil_div<int64_t>(o.filters, 32) * ceil_div(o.taps, kTaps) <
                                             ((int64_t{1} << 31) - 1) / std::max(o.batch, 1),
        "too many filters, conditions and taps for one launch");
  return o;
}

Tensor forward(Tensor weight, Tensor v, Tensor w1, Tensor w2, Tensor b2, std::string activation, bool residual,
               std::optional<ScalarType> out_dtype) {
  const Sizes o = sizes(weight, v, w1, w2, activation, residual);
  check(on_device(b2) && b2.get_device_index() == weight.get_device_index() && b2.scalar_type() == v.scalar_type() &&
            b2.dim() == 1 && b2.size(0) == o.taps,
        "b2 must be [K], like v");
  const ScalarType dtype = out_dtype.value_or(weight.scalar_type());
  check(is_float(dtype), "out_dtype must be float64, float32, bfloat16 or float16");
  const OnDeviceOf device(weight);
  const Tensor w = packed(weight), bias = packed(v), first = packed(w1), second = packed(w2), last = packed(b2);
  const Tensor out = empty(weight, {o.batch, o.filters, o.taps}, dtype);
  if (out.numel() == 0) return out;
  with_compute(v, [&](auto c) {
    using C = decltype(c);
    const Layers<C> net{numbers_of<C>(bias), numbers_of<C>(first), numbers_of<C>(second), numbers_of<C>(last)};
    launch_network(input_of(w), net, output_of(out), o, device.stream());
  });
  check_launches();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor weight, Tensor v, Tensor w1, Tensor w2,
                                                            std::string activation, bool residual, bool need_weight) {
  const Sizes o = sizes(weight, v, w1, w2, activation, residual);
  check(on_device(grad) && grad.get_device_index() == weight.get_device_index() && is_float(grad.scalar_type()) &&
            sizes_of(grad) == Integers{o.batch, o.filters, o.taps},
        "grad must be a floating point tensor [B, F, K] on the device of weight");
  const OnDeviceOf device(weight);
  const Tensor g = packed(grad), w = packed(weight), bias = packed(v), first = packed(w1), second = packed(w2);
  const ScalarType dtype = v.scalar_type();
  Tensor dweight = empty(weight, need_weight ? sizes_of(weight) : Integers{0}, weight.scalar_type());
  Tensor dv = empty(v, sizes_of(v), dtype), dw1 = empty(v, sizes_of(w1), dtype), dw2 = empty(v, sizes_of(w2), dtype);
  Tensor db2 = empty(v, {o.taps}, dtype);
  if (g.numel() == 0) {
    for (Tensor* t : {&dweight, &dv, &dw1, &dw2, &db2}) torch::stable::zero_(*t);
    return {dweight, dv, dw1, dw2, db2};
  }
  with_compute(v, [&](auto c) {
    using C = decltype(c);
    const Cut cut = Cut::of<C>(o);
    const Parts at(o);
    const bool in_parts = need_weight && cut.weight_in_parts();
    const Tensor parts = empty(v, {cut.groups.count * at.size}, dtype);
    const Tensor weight_parts = empty(v, {in_parts ? cut.chunks * o.bank() : 0}, dtype);
    const Layers<C> net{numbers_of<C>(bias), numbers_of<C>(first), numbers_of<C>(second), nullptr};
    const Output to = output_if(need_weight, dweight);
    const Targets<4> sums{{output_of(dv), output_of(dw1), output_of(dw2), output_of(db2)},
                          {0, at.w1, at.w2, at.b2, at.size}};
    launch_network_grads(input_of(g), input_of(w), net, to, numbers_if<C>(in_parts, weight_parts), numbers_of<C>(parts),
                         sums, o, device.stream());
  });
  check_launches();
  return {dweight, dv, dw1, dw2, db2};
}

}  // namespace
}  // namespace wx::gpu::mlp

WX_CUDA_LIBRARY(m) {
  m.impl("filter_mlp_fwd", TORCH_BOX(&wx::gpu::mlp::forward));
  m.impl("filter_mlp_bwd", TORCH_BOX(&wx::gpu::mlp::backward));
}
