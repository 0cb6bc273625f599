// One row of a warp matrix, its gradient, and the parameters of T; reference.py has the maths and the names. One source
// for host and device; no torch header.
#pragma once
#include <cmath>

#include "../common/host_device.h"

namespace wx::wm {

enum class Kind { affine, rotate, scale, shear };

WX_HOST_DEVICE inline int params_of(Kind kind) { return kind == Kind::affine ? 6 : kind == Kind::rotate ? 1 : 2; }

// A kernel and how it is interpolated; C is float or double.
template <class C>
struct Grid {
  int height, width;
  C dy_over_dx, dx_over_dy, per_dy, per_dx;
  bool bicubic, border;

  WX_HOST_DEVICE Grid(int h, int w, double dy, double dx, bool is_bicubic, bool is_border)
      : height(h),
        width(w),
        dy_over_dx(static_cast<C>(dy / dx)),
        dx_over_dy(static_cast<C>(dx / dy)),
        per_dy(static_cast<C>(1 / dy)),
        per_dx(static_cast<C>(1 / dx)),
        bicubic(is_bicubic),
        border(is_border) {}

  WX_HOST_DEVICE int taps() const { return height * width; }
};

// T [6] of a kind's numbers.
template <class C>
WX_HOST_DEVICE inline void matrix(Kind kind, const C* params, C* t) {
  using std::cos;
  using std::sin;
  for (int k = 0; k < 6; k++) t[k] = k % 4 == 0 ? C(1) : C(0);
  if (kind == Kind::affine) {
    for (int k = 0; k < 6; k++) t[k] = params[k];
  } else if (kind == Kind::rotate) {
    t[0] = t[4] = cos(params[0]);
    t[3] = sin(params[0]);
    t[1] = -t[3];
  } else if (kind == Kind::scale) {
    t[0] = 1 / params[0];
    t[4] = 1 / params[1];
  } else {
    t[1] = params[0];
    t[3] = params[1];
  }
}

// dparams of dT [6].
template <class C>
WX_HOST_DEVICE inline void of_params(Kind kind, const C* dt, const C* params, C* dparams) {
  using std::cos;
  using std::sin;
  if (kind == Kind::affine) {
    for (int k = 0; k < 6; k++) dparams[k] = dt[k];
  } else if (kind == Kind::rotate) {
    dparams[0] = (dt[3] - dt[1]) * cos(params[0]) - (dt[0] + dt[4]) * sin(params[0]);
  } else if (kind == Kind::scale) {
    dparams[0] = -dt[0] / (params[0] * params[0]);
    dparams[1] = -dt[4] / (params[1] * params[1]);
  } else {
    dparams[0] = dt[1];
    dparams[1] = dt[3];
  }
}

// The taps of one axis around a position: which (-1: none, or outside where zeros are), their X and X'. Always four, so
// that a GPU keeps them in registers.
template <class C>
struct Axis {
  int at[4];
  C value[4], slope[4];
  C rest;  // X of all others: 0, but NaN for a position that is not finite

  // X of the tap j; two of the four may be the same where the nearest one stands for those outside.
  WX_HOST_DEVICE C of(int j) const {
    C sum = rest;
    for (int t = 0; t < 4; t++) sum += at[t] == j ? value[t] : C(0);
    return sum;
  }
};

template <class C>
WX_HOST_DEVICE inline Axis<C> along(C s, int size, bool bicubic, bool border) {
  using std::floor;
  Axis<C> axis;
  const C n = floor(s), f = s - n, g = 1 - f;
  axis.rest = 0 * s;
  if (bicubic) {
    axis.value[0] = C(-0.75) * f * g * g;
    axis.value[1] = (C(1.25) * f - C(2.25)) * f * f + 1;
    axis.value[2] = (C(1.25) * g - C(2.25)) * g * g + 1;
    axis.value[3] = C(-0.75) * g * f * f;
    axis.slope[0] = C(-0.75) * g * (g - 2 * f);
    axis.slope[1] = (C(3.75) * f - C(4.5)) * f;
    axis.slope[2] = -(C(3.75) * g - C(4.5)) * g;
    axis.slope[3] = C(-0.75) * f * (2 * g - f);
  } else {
    axis.value[0] = g;
    axis.value[1] = f;
    axis.slope[0] = -1;
    axis.slope[1] = 1;
    for (int t = 2; t < 4; t++) axis.value[t] = axis.slope[t] = 0;
  }
  // far outside, where an int may not hold n, every position is the same
  const C last = static_cast<C>(size - 1), near = n < -4 ? C(-4) : n > last + 4 ? last + 4 : n;
  for (int t = 0; t < 4; t++) {
    const int tap = (near == near ? static_cast<int>(near) : 0) + t - (bicubic ? 1 : 0);
    const bool inside = 0 <= tap && tap < size, used = bicubic || t < 2;
    axis.at[t] = inside && used ? tap : !(border && used) ? -1 : tap < 0 ? 0 : size - 1;
  }
  return axis;
}

// Where the tap p of the warped kernel comes from; X and Y are the two factors of row p of A.
template <class C>
struct Source {
  Axis<C> x, y;
  C to_x[3], to_y[3];

  WX_HOST_DEVICE Source(const Grid<C>& grid, const C* t, int p) {
    const C mid_y = C(0.5) * static_cast<C>(grid.height - 1), mid_x = C(0.5) * static_cast<C>(grid.width - 1);
    const C from_y = static_cast<C>(p / grid.width) - mid_y, from_x = static_cast<C>(p % grid.width) - mid_x;
    to_x[0] = from_x, to_x[1] = from_y * grid.dy_over_dx, to_x[2] = grid.per_dx;
    to_y[0] = from_x * grid.dx_over_dy, to_y[1] = from_y, to_y[2] = grid.per_dy;
    const C s_x = (t[0] * to_x[0] + t[1] * to_x[1] + t[2] * to_x[2]) + mid_x;
    const C s_y = (t[3] * to_y[0] + t[4] * to_y[1] + t[5] * to_y[2]) + mid_y;
    x = along(s_x, grid.width, grid.bicubic, grid.border);
    y = along(s_y, grid.height, grid.bicubic, grid.border);
  }

  // dt[6] += what dA[p, :], the row `grad` of K numbers, contributes to dT.
  WX_HOST_DEVICE void add_gradient(const Grid<C>& grid, const C* grad, C* dt) const {
    C ds_x = x.rest + y.rest, ds_y = ds_x;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) {
        if (y.at[i] < 0 || x.at[j] < 0) continue;
        const C g = grad[y.at[i] * grid.width + x.at[j]];
        ds_x += g * y.value[i] * x.slope[j];
        ds_y += g * y.slope[i] * x.value[j];
      }
    for (int k = 0; k < 3; k++) dt[k] += ds_x * to_x[k], dt[3 + k] += ds_y * to_y[k];
  }
};

}  // namespace wx::wm
