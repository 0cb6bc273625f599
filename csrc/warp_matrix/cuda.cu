// Warp matrices on CUDA: from tensors to kernels.cuh. Everything is checked before anything is allocated.
#include "../common/cuda_numbers.h"
#include "../common/cuda_shims.h"
#include "kernels.cuh"

#include <string>

namespace wx::gpu::wm {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "warp_matrix: ", what); }

Kind kind_of(const std::string& name) {
  const bool known = name == "affine" || name == "rotate" || name == "scale" || name == "shear";
  check(known, "kind must be 'affine', 'rotate', 'scale' or 'shear'");
  return name == "affine"   ? Kind::affine
         : name == "rotate" ? Kind::rotate
         : name == "scale"  ? Kind::scale
                            : Kind::shear;
}

void check_params(const Tensor& params, Kind kind, int64_t height, int64_t width, double dy, double dx,
                  const std::string& interpolation, const std::string& padding) {
  const ScalarType dtype = params.scalar_type();
  check(on_device(params) && (dtype == ScalarType::Float || dtype == ScalarType::Double),
        "params must be float64 or float32, on a CUDA device");
  check(params.dim() == 2 && params.size(1) == params_of(kind),
        "params must be [B, P], with P the numbers of the kind");
  check(1 <= height && 1 <= width && height <= 4096 && width <= 4096, "height and width must be from 1 to 4096");
  check(dy > 0 && dx > 0, "dy and dx must be positive");
  check(interpolation == "bicubic" || interpolation == "bilinear", "interpolation must be 'bilinear' or 'bicubic'");
  check(padding == "border" || padding == "zeros", "padding must be 'zeros' or 'border'");
  check(params.size(0) * height * width <= int64_t{1} << 36, "the matrices must have at most 2^36 rows");
}

Tensor forward(Tensor params, std::string kind_name, int64_t height, int64_t width, double dy, double dx,
               std::string interpolation, std::string padding) {
  const Kind kind = kind_of(kind_name);
  check_params(params, kind, height, width, dy, dx, interpolation, padding);
  const OnDeviceOf device(params);
  const int64_t batch = params.size(0), taps = height * width;
  const Tensor numbers = packed(params), out = empty(params, {batch, taps, taps}, params.scalar_type());
  if (batch == 0) return out;
  with_compute(params, [&](auto c) {
    using C = decltype(c);
    const Grid<C> grid(static_cast<int>(height), static_cast<int>(width), dy, dx, interpolation == "bicubic",
                       padding == "border");
    launch_matrices(numbers_of<C>(numbers), numbers_of<C>(out), grid, kind, batch, device.stream());
  });
  check_launches();
  return out;
}

Tensor backward(Tensor grad, Tensor params, std::string kind_name, int64_t height, int64_t width, double dy, double dx,
                std::string interpolation, std::string padding) {
  const Kind kind = kind_of(kind_name);
  check_params(params, kind, height, width, dy, dx, interpolation, padding);
  const int64_t batch = params.size(0), taps = height * width;
  check(on_device(grad) && grad.get_device_index() == params.get_device_index() &&
            grad.scalar_type() == params.scalar_type() && sizes_of(grad) == Integers{batch, taps, taps},
        "grad must be [B, K, K], like params");
  const OnDeviceOf device(params);
  const Tensor numbers = packed(params), g = packed(grad), out = empty(params, sizes_of(params), params.scalar_type());
  if (batch == 0) return out;
  with_compute(params, [&](auto c) {
    using C = decltype(c);
    const Grid<C> grid(static_cast<int>(height), static_cast<int>(width), dy, dx, interpolation == "bicubic",
                       padding == "border");
    launch_gradients(numbers_of<C>(g), numbers_of<C>(numbers), numbers_of<C>(out), grid, kind, batch, device.stream());
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
