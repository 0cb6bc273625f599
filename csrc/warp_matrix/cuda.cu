// Warp matrices on CUDA: from tensors to kernels.cuh. Everything is checked before anything is allocated.
#include "../common/cuda_numbers.h"
#include "../common/cuda_shims.h"
#include "kernels.cuh"
#include "warp.h"

namespace wx::gpu::wm {
namespace {

void check_params(const Tensor& params, const Warp& warp) {
  warp.check_params(params, on_device(params));
  check(params.size(0) * warp.taps() < int64_t{1} << 36, "the matrices must have fewer than 2^36 rows");
  check(params.size(0) < int64_t{1} << 31, "there must be fewer than 2^31 conditions");
}

Tensor forward(Tensor params, std::string kind, int64_t height, int64_t width, double dy, double dx,
               std::string interpolation, std::string padding) {
  const Warp warp(kind, height, width, dy, dx, interpolation, padding);
  check_params(params, warp);
  const OnDeviceOf device(params);
  const int64_t batch = params.size(0), taps = warp.taps();
  const Tensor numbers = packed(params), out = empty(params, {batch, taps, taps}, params.scalar_type());
  if (batch == 0) return out;
  with_compute(params, [&](auto c) {
    using C = decltype(c);
    launch_matrices(numbers_of<C>(numbers), numbers_of<C>(out), warp.grid<C>(), warp.kind, batch, device.stream());
  });
  check_launches();
  return out;
}

Tensor backward(Tensor grad, Tensor params, std::string kind, int64_t height, int64_t width, double dy, double dx,
                std::string interpolation, std::string padding) {
  const Warp warp(kind, height, width, dy, dx, interpolation, padding);
  check_params(params, warp);
  const int64_t batch = params.size(0), taps = warp.taps();
  check(on_device(grad) && grad.get_device_index() == params.get_device_index() &&
            grad.scalar_type() == params.scalar_type() && sizes_of(grad) == Integers{batch, taps, taps},
        "grad must be [B, K, K], like params");
  const OnDeviceOf device(params);
  const Tensor numbers = packed(params), g = packed(grad), out = empty(params, sizes_of(params), params.scalar_type());
  if (batch == 0) return out;
  with_compute(params, [&](auto c) {
    using C = decltype(c);
    launch_gradients(numbers_of<C>(g), numbers_of<C>(numbers), numbers_of<C>(out), warp.grid<C>(), warp.kind, batch,
                     device.stream());
  });
  check_launches();
  return out;
}

}  // namespace
}  // namespace wx::gpu::wm

WX_CUDA_LIBRARY(m) {
  m.impl("warp_matrix_fwd", TORCH_BOX(&wx::gpu::wm::forward));
  m.impl("warp_matrix_bwd", TORCH_BOX(&wx::gpu::wm::backward));
}
