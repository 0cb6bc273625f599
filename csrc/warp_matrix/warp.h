// What the ops of warp matrices are told beside their tensors, for every device.
#pragma once
#include <string>

#include "../common/checks.h"
#include "affine.h"

namespace wx::wm {

inline void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "warp_matrix: ", what); }

inline Kind kind_of(const std::string& name) {
  const bool known = name == "affine" || name == "rotate" || name == "scale" || name == "shear";
  check(known, "kind must be 'affine', 'rotate', 'scale' or 'shear'");
  return name == "affine"   ? Kind::affine
         : name == "rotate" ? Kind::rotate
         : name == "scale"  ? Kind::scale
                            : Kind::shear;
}

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
  int64_t taps() const { return height * width; }

  // `here`: on the device of the op.
  void check_params(const Tensor& params, bool here) const {
    const ScalarType dtype = params.scalar_type();
    check(here && (dtype == ScalarType::Float || dtype == ScalarType::Double),
          "params must be float64 or float32, on the device of the op");
    check(params.dim() == 2 && params.size(1) == params_of(kind),
          "params must be [B, P], with P the numbers of the kind");
  }
  template <class C>
  Grid<C> grid() const {
    return {static_cast<int>(height), static_cast<int>(width), dy, dx, bicubic, border};
  }
};

}  // namespace wx::wm
