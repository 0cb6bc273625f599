// Warp matrices on the CPU, a condition after another; reference.py has the maths, affine.h a row of it.
#include "../common/dense.h"
#include "../common/work.h"
#include "warp.h"

namespace wx::wm {
namespace {

// f(b) for every condition; a small matrix is not worth a second thread.
template <class F>
void for_each(int64_t batch, int64_t taps, const F& f) {
  constexpr int64_t kEntries = 1 << 16;  // some 0.1 ms
  batch * taps * taps < kEntries ? Alone()(batch, f) : Threads()(batch, f);
}

Tensor forward(Tensor params, std::string kind, int64_t height, int64_t width, double dy, double dx,
               std::string interpolation, std::string padding) {
  const Warp warp(kind, height, width, dy, dx, interpolation, padding);
  warp.check_params(params, params.is_cpu());
  const Tensor numbers = packed(params);
  const int64_t batch = params.size(0), taps = warp.taps(), each = params.size(1);
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
  warp.check_params(params, params.is_cpu());
  const int64_t batch = params.size(0), taps = warp.taps(), each = params.size(1);
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
