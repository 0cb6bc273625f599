// Filter warps on CUDA: from tensors to kernels.cuh. Everything is checked before anything is allocated.
#include "../common/cuda_numbers.h"
#include "../common/cuda_shims.h"
#include "kernels.cuh"

namespace wx::gpu::fw {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "filter_warp: ", what); }

Sizes sizes(const Tensor& weight, const Tensor& a) {
  check(on_device(weight) && is_float(weight.scalar_type()) && weight.dim() == 3,
        "weight must be a floating point CUDA tensor [E, F, K]");
  check(on_device(a) && a.get_device_index() == weight.get_device_index() &&
            a.scalar_type() == opmath(weight.scalar_type()),
        "a must be on the device of weight, float64 for a float64 weight, else float32");
  const int64_t banks = weight.size(0), taps = weight.size(2);
  check(a.dim() == 4 && a.size(1) == banks && a.size(2) == taps && a.size(3) == taps, "a must be [B, E, K, K]");
  check(banks >= 1 && taps >= 1, "there must be a bank and a tap");
  constexpr int64_t kMost = int64_t{1} << 30;
  check(a.size(0) * taps <= kMost && banks * taps <= kMost, "B K and E K must be at most 2^30");
  return {weight.size(1), static_cast<int>(a.size(0)), static_cast<int>(banks), static_cast<int>(taps)};
}

// Blocks are counted in 31 bits.
void check_blocks(const Sizes& o) {
  check(o.filters <= int64_t{1} << 40, "too many filters");
  const int64_t most = (int64_t{1} << 31) - 1;
  check(Map::forward(o).row_tiles() * Map::forward(o).filter_tiles() <= most &&
            Map::backward(o).row_tiles() * Map::backward(o).filter_tiles() <= most,
        "too many filters, conditions and taps for one launch");
}

Tensor forward(Tensor weight, Tensor a, std::optional<ScalarType> out_dtype) {
  const Sizes o = sizes(weight, a);
  check_blocks(o);
  const ScalarType dtype = out_dtype.value_or(weight.scalar_type());
  check(is_float(dtype), "out_dtype must be float64, float32, bfloat16 or float16");
  const OnDeviceOf device(weight);
  const Tensor w = packed(weight), m = packed(a), out = empty(weight, {o.batch, o.filters, o.taps}, dtype);
  if (out.numel() == 0) return out;
  with_compute(
      a, [&](auto c) { launch_forward(input_of(w), numbers_of<decltype(c)>(m), output_of(out), o, device.stream()); });
  check_launches();
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor weight, Tensor a, bool need_weight, bool need_a) {
  const Sizes o = sizes(weight, a);
  check_blocks(o);
  check(on_device(grad) && grad.get_device_index() == weight.get_device_index() && is_float(grad.scalar_type()) &&
            sizes_of(grad) == Integers{o.batch, o.filters, o.taps},
        "grad must be a floating point tensor [B, F, K] on the device of weight");
  const OnDeviceOf device(weight);
  const Tensor g = packed(grad), w = packed(weight), m = packed(a);
  Tensor dweight = empty(weight, need_weight ? sizes_of(weight) : Integers{0}, weight.scalar_type());
  Tensor da = empty(weight, need_a ? sizes_of(a) : Integers{0}, a.scalar_type());
  if (g.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(da);
    return {dweight, da};
  }
  if (!need_weight && !need_a) return {dweight, da};
  with_compute(a, [&](auto c) {
    using C = decltype(c);
    const Tensor parts = empty(weight, {need_a ? count_parts<C>(o) * a.numel() : 0}, a.scalar_type());
    const Output to = output_if(need_weight, dweight);
    launch_backward(input_of(g), input_of(w), numbers_of<C>(m), to, numbers_if<C>(need_a, parts), numbers_of<C>(da), o,
                    device.stream());
  });
  check_launches();
  return {dweight, da};
}

}  // namespace
}  // namespace wx::gpu::fw

WX_CUDA_LIBRARY(m) {
  m.impl("filter_warp_fwd", TORCH_BOX(&wx::gpu::fw::forward));
  m.impl("filter_warp_bwd", TORCH_BOX(&wx::gpu::fw::backward));
}
