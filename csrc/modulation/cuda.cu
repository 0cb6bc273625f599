// Modulation on CUDA: from tensors to modulate.cuh. Everything is checked before anything is allocated.
#include "../common/cuda_numbers.h"
#include "../common/cuda_shims.h"
#include "modulate.cuh"

namespace wx::gpu::mod {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "modulate: ", what); }

Sizes sizes(const Tensor& weight, const Tensor& style) {
  check(on_device(weight) && is_float(weight.scalar_type()) && weight.dim() == 3,
        "weight must be a floating point CUDA tensor [O, I, K]");
  check(on_device(style) && style.get_device_index() == weight.get_device_index() &&
            style.scalar_type() == opmath(weight.scalar_type()),
        "style must be on the device of weight, float64 for a float64 weight, else float32");
  check(style.dim() == 2 && style.size(1) == weight.size(1), "style must be [N, I]");
  constexpr int64_t kMost = int64_t{1} << 30;
  check(weight.size(1) * weight.size(2) <= kMost && weight.size(0) * (style.size(0) + kSamples) <= kMost,
        "I K and N O must be at most 2^30");
  const auto size = [](const Tensor& t, int i) { return static_cast<int>(t.size(i)); };
  return {size(style, 0), size(weight, 0), size(weight, 1), size(weight, 2)};
}

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor style, bool demodulate, double eps,
                                   std::optional<ScalarType> out_dtype) {
  const Sizes o = sizes(weight, style);
  const ScalarType dtype = out_dtype.value_or(weight.scalar_type());
  check(is_float(dtype), "out_dtype must be float64, float32, bfloat16 or float16");
  const OnDeviceOf device(weight);
  const Tensor w = packed(weight), s = packed(style);
  const Tensor out = empty(weight, {o.samples, o.outputs, o.inputs, o.taps}, dtype);
  const Tensor d = empty(weight, {o.samples, o.outputs}, style.scalar_type());
  if (d.numel() == 0) return {out, d};
  with_compute(style, [&](auto c) {
    using C = decltype(c);
    launch_modulate(input_of(w), numbers_of<C>(s), output_of(out), numbers_of<C>(d), o, demodulate, eps,
                    device.stream());
  });
  check_launches();
  return {out, d};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor weight, Tensor style, Tensor d, bool demodulate,
                                    bool need_weight, bool need_style) {
  const Sizes o = sizes(weight, style);
  const auto here = [&](const Tensor& t) { return on_device(t) && t.get_device_index() == weight.get_device_index(); };
  check(
      here(grad) && is_float(grad.scalar_type()) && sizes_of(grad) == Integers{o.samples, o.outputs, o.inputs, o.taps},
      "grad must be a floating point tensor [N, O, I, K] on the device of weight");
  check(here(d) && d.scalar_type() == style.scalar_type() && sizes_of(d) == Integers{o.samples, o.outputs},
        "d must be [N, O], like style");
  const OnDeviceOf device(weight);
  const Tensor g = packed(grad), w = packed(weight), s = packed(style), scales = packed(d);
  Tensor dweight = empty(weight, need_weight ? sizes_of(weight) : Integers{0}, weight.scalar_type());
  Tensor dstyle = empty(weight, need_style ? sizes_of(style) : Integers{0}, style.scalar_type());
  if (g.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dstyle);
    return {dweight, dstyle};
  }
  if (!need_weight && !need_style) return {dweight, dstyle};
  with_compute(style, [&](auto c) {
    using C = decltype(c);
    const Cut cut = Cut::of<C>(o, need_weight);
    const Tensor parts = empty(weight, {need_style ? cut.groups * style.numel() : 0}, style.scalar_type());
    const Tensor row = empty(weight, {cut.row_numbers}, style.scalar_type());
    const Output to = output_if(need_weight, dweight);
    launch_modulate_grads(input_of(g), input_of(w), numbers_of<C>(s), numbers_of<C>(scales), to,
                          numbers_if<C>(need_style, parts), numbers_of<C>(dstyle), numbers_if<C>(cut.row_numbers, row),
                          o, cut, demodulate, device.stream());
  });
  check_launches();
  return {dweight, dstyle};
}

}  // namespace
}  // namespace wx::gpu::mod

WX_CUDA_LIBRARY(m) {
  m.impl("modulate_fwd", TORCH_BOX(&wx::gpu::mod::forward));
  m.impl("modulate_bwd", TORCH_BOX(&wx::gpu::mod::backward));
}
