// Warp matrices on the CPU, a condition after another; reference.py has the maths, affine.h a row of it.
#include <string>

#include "../common/dense.h"
#include "../common/work.h"
#include "affine.h"

namespace wx::wm {
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

// What both ops are told beside their tensors.
struct Warp {
  Kind kind;
  int64_t height, width;
  double dy, dx;
  bool bicubic, border;

  Warp(const std::string& name, int64_t h, int64_t w, double y, double x, const std::string& interpolation,
       const std::string& padding)
      : kind(kind_of(name)),
        height(h),
        width(w),
        dy(y),
        dx(x),
        bicubic(interpolation == "bicubic"),
        border(padding == "border") {
    check(1 <= h && 1 <= w && h <= 4096 && w <= 4096, "height and width must be from 1 to 4096");
    check(y > 0 && x > 0, "dy and dx must be positive");
    check(bicubic || interpolation == "bilinear", "interpolation must be 'bilinear' or 'bicubic'");
    check(border || padding == "zeros", "padding must be 'zeros' or 'border'");
  }
  template <class C>
  Grid<C> grid() const {
    return {static_cast<int>(height), static_cast<int>(width), dy, dx, bicubic, border};
  }
};

void check_params(const Tensor& params, Kind kind) {
  const ScalarType dtype = params.scalar_type();
  check(params.is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::Double),
        "params must be float64 or float32, on the CPU");
  check(params.dim() == 2 && params.size(1) == params_of(kind),
        "params must be [B, P], with P the numbers of the kind");
}

// f(b) for every condition; a small matrix is not worth a second thread.
template <class F>
void for_each(int64_t batch, int64_t taps, const F& f) {
  constexpr int64_t kEntries = 1 << 16;  // some 0.1 ms
  batch * taps * taps < kEntries ? Alone()(batch, f) : Threads()(batch, f);
}

Tensor forward(Tensor params, std::string kind, int64_t height, int64_t width, double dy, double dx,
               std::string interpolation, std::string padding) {
  const Warp warp(kind, height, width, dy, dx, interpolation, padding);
  check_params(params, warp.kind);
  const Tensor numbers = packed(params);
  const int64_t batch = params.size(0), taps = height * width, each = params.size(1);
  const Tensor out = contiguous({batch, taps, taps}, params.scalar_type());
  const auto run = [&](auto c) {
    using C = decltype(c);
    const Grid<C> grid = warp.grid<C>();
    const C* from = static_cast<const C*>(numbers.data_ptr());
    C* to = static_cast<C*>(out.data_ptr());
    for_each(batch, taps, [&](int64_t b) {
      C t[6];
      matrix(warp.kind, from + b * each, t);
      C* entry = to + b * taps * taps;
      for (int p = 0; p < taps; p++) {
        const Source<C> source(grid, t, p);
        for (int i = 0; i < height; i++) {
          const C y = source.y.of(i);
          for (int j = 0; j < width; j++) *entry++ = y * source.x.of(j);
        }
      }
    });
  };
  params.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

Tensor backward(Tensor grad, Tensor params, std::string kind, int64_t height, int64_t width, double dy, double dx,
                std::string interpolation, std::string padding) {
  const Warp warp(kind, height, width, dy, dx, interpolation, padding);
  check_params(params, warp.kind);
  const int64_t batch = params.size(0), taps = height * width, each = params.size(1);
  check(grad.is_cpu() && grad.scalar_type() == params.scalar_type() && to_dims(grad.sizes()) == Dims{batch, taps, taps},
        "grad must be [B, K, K] with the dtype of params, on the CPU");
  const Tensor numbers = packed(params), g = packed(grad);
  const Tensor out = contiguous({batch, each}, params.scalar_type());
  const auto run = [&](auto c) {
    using C = decltype(c);
    const Grid<C> grid = warp.grid<C>();
    const C *from = static_cast<const C*>(numbers.data_ptr()), *of = static_cast<const C*>(g.data_ptr());
    C* to = static_cast<C*>(out.data_ptr());
    for_each(batch, taps, [&](int64_t b) {
      C t[6], dt[6] = {};
      matrix(warp.kind, from + b * each, t);
      for (int p = 0; p < taps; p++) Source<C>(grid, t, p).add_gradient(grid, of + (b * taps + p) * taps, dt);
      of_params(warp.kind, dt, from + b * each, to + b * each);
    });
  };
  params.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

}  // namespace
}  // namespace wx::wm

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("warp_matrix_fwd", TORCH_BOX(&wx::wm::forward));
  m.impl("warp_matrix_bwd", TORCH_BOX(&wx::wm::backward));
}
