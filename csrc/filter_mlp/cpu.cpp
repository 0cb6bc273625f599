// The network over each filter on the CPU; reference.py has the maths.
//
// A tile of filters goes through all conditions: what its first layer makes of the taps is the same for all of them,
// and a block of hidden units never leaves the first cache. Forward the lanes are filters, backward hidden units, so
// that what is summed over the filters is summed in registers; a block of filters has its own sums, added in their
// order.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/layout.h"
#include "../common/work.h"
#include "tiles.h"

namespace wx::mlp {
namespace {

constexpr int64_t kTile = 32;        // filters
constexpr int64_t kUnits = 64;       // hidden units at a time
constexpr int64_t kPad = 16;         // hidden units, and taps, of padded rows: the most lanes that there are
constexpr int64_t kBlock = 1024;     // filters of a partial sum, at the least
constexpr int64_t kMaxBlocks = 64;   // bounds the partial sums
constexpr int64_t kAlone = 1 << 20;  // multiplications for which a second thread is not worth waking

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "filter_mlp: ", what); }

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Shape {
  int64_t conditions, filters, taps, hidden;

  Shape(const Tensor& weight, const Tensor& v, const Tensor& w1, const Tensor& w2) {
    check(weight.is_cpu() && weight.dim() == 2 && is_float(weight.scalar_type()),
          "weight must be [F, K] on the CPU, float64, float32, bfloat16 or float16");
    const ScalarType wide = opmath(weight.scalar_type());
    for (const Tensor* t : {&v, &w1, &w2})
      check(t->is_cpu() && t->dim() == 2 && t->scalar_type() == wide,
            "v, w1 and w2 must be matrices on the CPU, float64 for a float64 weight, else float32");
    conditions = v.size(0), filters = weight.size(0), taps = weight.size(1), hidden = v.size(1);
    check(to_dims(w1.sizes()) == Dims({hidden, taps}) && to_dims(w2.sizes()) == Dims({taps, hidden}),
          "v must be [B, H], w1 [H, K] and w2 [K, H]");
    check(hidden >= 1 && taps >= 1, "there must be a hidden unit and a tap");
  }
  int64_t work() const { return conditions * filters * taps * hidden; }
};

template <class F>
void in_parallel(const Shape& at, int64_t n, const F& f) {
  if (at.work() <= kAlone)
    Alone()(n, f);
  else
    Threads()(n, f);
}

template <class F>
void with_activation(const std::string& name, const F& f) {
  check(name == "relu" || name == "silu" || name == "tanh", "activation must be relu, silu or tanh");
  if (name == "relu") return f(std::integral_constant<Activation, Activation::relu>{});
  if (name == "silu") return f(std::integral_constant<Activation, Activation::silu>{});
  f(std::integral_constant<Activation, Activation::tanh>{});
}

template <class C>
void multiply(typename Product<C>::Entries a, int64_t rows, const C* x, int64_t ldx, int64_t count,
              typename Product<C>::Rows y, int64_t width, bool add) {
  run<Product<C>>(a, rows, x, ldx, count, y, width, add);
}

template <class T, class O>
struct Forward {
  using C = Compute<T>;
  const Shape& at;
  const T* weight;
  const C *v, *w1, *w2, *b2;
  bool residual, past_cache;
  O* out;

  template <Activation A>
  void tiles(int64_t begin, int64_t end) const {
    const int64_t all = at.taps * kTile;
    std::vector<C> w(all), u(at.hidden * kTile), h(kUnits * kTile), sums(all), rows(all);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      run<Turned<C, T>>(weight + first * at.taps, count, at.taps, kTile, w.data());
      multiply<C>({w1, at.taps, 1}, at.hidden, w.data(), kTile, at.taps, {u.data(), kTile}, kTile, false);
      for (int64_t b = 0; b < at.conditions; b++) {
        if (residual)
          std::copy(w.begin(), w.end(), sums.begin());
        else
          std::fill(sums.begin(), sums.end(), C(0));
        for (int64_t j = 0; j < at.hidden; j += kUnits) {
          const int64_t units = std::min(kUnits, at.hidden - j);
          run<Hidden<C, A>>(static_cast<const C*>(u.data()) + j * kTile, v + b * at.hidden + j, units, kTile, h.data());
          multiply<C>({w2 + j, at.hidden, 1}, at.taps, h.data(), kTile, units, {sums.data(), kTile}, kTile, true);
        }
        run<TurnedBack<C>>(static_cast<const C*>(sums.data()), b2, at.taps, kTile, rows.data());
        O* to = out + (b * at.filters + first) * at.taps;
        const bool lines = past_cache && count == kTile && reinterpret_cast<uintptr_t>(to) % 64 == 0;
        run<Copied<C, O>>(static_cast<const C*>(rows.data()), count * at.taps, to, lines);
      }
    }
    if (past_cache) stream_fence();
  }

  template <Activation A>
  void run_all() const {
    constexpr int64_t kPart = 8 * kTile;
    in_parallel(at, (at.filters + kPart - 1) / kPart,
                [&](int64_t k) { tiles<A>(k * kPart, std::min(at.filters, (k + 1) * kPart)); });
  }
};

Tensor forward(Tensor weight, Tensor v, Tensor w1, Tensor w2, Tensor b2, std::string activation, bool residual,
               std::optional<ScalarType> out_dtype) {
  const Shape at(weight, v, w1, w2);
  const ScalarType dtype = weight.scalar_type(), result = out_dtype.value_or(dtype);
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  check(b2.is_cpu() && b2.scalar_type() == opmath(dtype) && to_dims(b2.sizes()) == Dims({at.taps}),
        "b2 must be [K], of the dtype of w2");
  const Tensor w = packed(weight), bias = packed(v), first = packed(w1), second = packed(w2), last = packed(b2);
  const Tensor out = contiguous({at.conditions, at.filters, at.taps}, result);
  const bool past_cache = out.numel() * itemsize(result) >= kPastCache;
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const auto wide = [](const Tensor& x) { return static_cast<const Compute<T>*>(x.data_ptr()); };
    dispatch(result, [&](auto o) {
      using O = decltype(o);
      const Forward<T, O> call{
          at,         static_cast<const T*>(w.data_ptr()), wide(bias), wide(first), wide(second), wide(last), residual,
          past_cache, static_cast<O*>(out.data_ptr())};
      with_activation(activation, [&](auto a) { call.template run_all<a()>(); });
    });
  });
  return out;
}

// Rows of a matrix [rows, columns] with zeros up to `width`; `turned` takes it from its transpose.
template <class C>
std::vector<C> padded(const C* from, int64_t rows, int64_t columns, int64_t width, bool turned = false) {
  std::vector<C> to(rows * width);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) to[r * width + c] = turned ? from[c * rows + r] : from[r * columns + c];
  return to;
}

template <class T, class G>
struct Backward {
  using C = Compute<T>;
  const Shape& at;
  const G* grad;
  const T* weight;
  bool residual;
  T* dweight;                         // or null
  int64_t units, width;               // hidden units and taps, padded
  std::vector<C> v, w1, w2, to_taps;  // [B, units], [K, units], [K, units], [H, width]

  Backward(const Shape& shape, const G* g, const T* w, const C* v_in, const C* w1_in, const C* w2_in, bool res, T* dw)
      : at(shape),
        grad(g),
        weight(w),
        residual(res),
        dweight(dw),
        units(rounded_up(at.hidden, kPad)),
        width(rounded_up(at.taps, kPad)),
        v(padded(v_in, at.conditions, at.hidden, units)),
        w1(padded(w1_in, at.taps, at.hidden, units, true)),
        w2(padded(w2_in, at.taps, at.hidden, units)),
        to_taps(padded(w1_in, at.hidden, at.taps, width)) {}

  // Sums over filters, one after another: dv [B, units], dw1 and dw2 [K, units], db2 [K].
  int64_t sums() const { return at.conditions * units + 2 * at.taps * units + at.taps; }

  struct Room {
    std::vector<C> w, g, u, s, h, e, dw, over_conditions, taps;
    explicit Room(const Backward& b)
        : w(kTile * b.at.taps),
          g(w.size()),
          u(kTile * kUnits),
          s(u.size()),
          h(u.size()),
          e(u.size()),
          dw(kTile * b.width),
          over_conditions(w.size()),
          taps(b.at.taps) {}
  };

  // Rows [first, first + count) of x as C: where they lie, or a copy with zeros up to a whole tile.
  template <class X>
  const C* rows(const X* x, int64_t first, int64_t count, std::vector<C>& copy) const {
    if constexpr (std::is_same_v<X, C>)
      if (count == kTile) return x + first * at.taps;
    run<Copied<X, C>>(x + first * at.taps, count * at.taps, copy.data(), false);
    std::fill(copy.begin() + count * at.taps, copy.end(), C(0));
    return copy.data();
  }

  template <Activation A>
  void tile(int64_t first, int64_t count, Room& room, C* sum) const {
    C *dv = sum, *dw1 = dv + at.conditions * units, *dw2 = dw1 + at.taps * units, *db2 = dw2 + at.taps * units;
    const C* w = rows(weight, first, count, room.w);
    std::fill(room.over_conditions.begin(), room.over_conditions.end(), C(0));
    std::fill(room.dw.begin(), room.dw.end(), C(0));
    for (int64_t j = 0; j < units; j += kUnits) {
      const int64_t n = std::min(kUnits, units - j);
      multiply<C>({w, at.taps, 1}, kTile, w1.data() + j, units, at.taps, {room.u.data(), n}, n, false);
      std::fill(room.e.begin(), room.e.end(), C(0));
      for (int64_t b = 0; b < at.conditions; b++) {
        const C* g = rows(grad + b * at.filters * at.taps, first, count, room.g);
        multiply<C>({g, at.taps, 1}, kTile, w2.data() + j, units, at.taps, {room.s.data(), n}, n, false);
        run<Slopes<C, A>>(static_cast<const C*>(room.u.data()), v.data() + b * units + j,
                          static_cast<const C*>(room.s.data()), room.h.data(), room.e.data(), dv + b * units + j, kTile,
                          n);
        multiply<C>({g, 1, at.taps}, at.taps, room.h.data(), n, kTile, {dw2 + j, units}, n, true);
        if (j == 0) run<Added<C>>(g, kTile * at.taps, room.over_conditions.data());
      }
      multiply<C>({w, 1, at.taps}, at.taps, room.e.data(), n, kTile, {dw1 + j, units}, n, true);
      if (dweight)
        multiply<C>({room.e.data(), n, 1}, kTile, to_taps.data() + j * width, width, std::min(n, at.hidden - j),
                    {room.dw.data(), width}, width, true);
    }
    std::fill(room.taps.begin(), room.taps.end(), C(0));
    for (int64_t f = 0; f < count; f++)
      run<Added<C>>(static_cast<const C*>(room.over_conditions.data()) + f * at.taps, at.taps, room.taps.data());
    run<Added<C>>(static_cast<const C*>(room.taps.data()), at.taps, db2);
    for (int64_t f = 0; f < count && dweight; f++) {
      const C* g = room.over_conditions.data() + f * at.taps;
      C* row = room.dw.data() + f * width;
      if (residual) run<Added<C>>(g, at.taps, row);
      run<Copied<C, T>>(static_cast<const C*>(row), at.taps, dweight + (first + f) * at.taps, false);
    }
  }

  template <Activation A>
  void run_all(C* dv, C* dw1, C* dw2, C* db2) const {
    const int64_t per_block = std::max(kBlock, rounded_up((at.filters + kMaxBlocks - 1) / kMaxBlocks, kTile));
    const int64_t blocks = (at.filters + per_block - 1) / per_block, n = sums();
    const Scratch<C> parts(blocks * n);
    in_parallel(at, blocks, [&](int64_t k) {
      Room room(*this);
      C* part = parts.data() + k * n;
      std::fill(part, part + n, C(0));
      const int64_t end = std::min(at.filters, (k + 1) * per_block);
      for (int64_t f = k * per_block; f < end; f += kTile) tile<A>(f, std::min(kTile, end - f), room, part);
    });
    std::vector<double> total(n);
    for (int64_t k = 0; k < blocks; k++)
      for (int64_t i = 0; i < n; i++) total[i] += static_cast<double>(parts.data()[k * n + i]);
    const double* from = total.data();
    for (int64_t b = 0; b < at.conditions; b++, from += units) std::copy(from, from + at.hidden, dv + b * at.hidden);
    for (int64_t p = 0; p < at.taps; p++, from += units)
      for (int64_t j = 0; j < at.hidden; j++) dw1[j * at.taps + p] = static_cast<C>(from[j]);
    for (int64_t p = 0; p < at.taps; p++, from += units) std::copy(from, from + at.hidden, dw2 + p * at.hidden);
    std::copy(from, from + at.taps, db2);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor weight, Tensor v, Tensor w1, Tensor w2,
                                                            std::string activation, bool residual, bool need_weight) {
  const Shape at(weight, v, w1, w2);
  const ScalarType dtype = weight.scalar_type(), wide = opmath(dtype), incoming = grad.scalar_type();
  check(grad.is_cpu() && to_dims(grad.sizes()) == Dims({at.conditions, at.filters, at.taps}), "grad must be [B, F, K]");
  const bool half = wide == ScalarType::Float && (incoming == ScalarType::BFloat16 || incoming == ScalarType::Half);
  const Tensor g = with_strides(grad, contiguous_strides(to_dims(grad.sizes())), half ? incoming : wide);
  const Tensor w = packed(weight), bias = packed(v), first = packed(w1), second = packed(w2);
  const Tensor dweight = contiguous(need_weight ? to_dims(w.sizes()) : Dims{0}, dtype);
  const Tensor dv = contiguous(to_dims(v.sizes()), wide), dw1 = contiguous(to_dims(w1.sizes()), wide),
               dw2 = contiguous(to_dims(w2.sizes()), wide), db2 = contiguous({at.taps}, wide);
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const auto numbers = [](const Tensor& x) { return static_cast<C*>(x.data_ptr()); };
    const auto run_on = [&](auto e) {
      using G = decltype(e);
      const Backward<T, G> call(at, static_cast<const G*>(g.data_ptr()), static_cast<const T*>(w.data_ptr()),
                                numbers(bias), numbers(first), numbers(second), residual,
                                need_weight ? static_cast<T*>(dweight.data_ptr()) : nullptr);
      with_activation(activation, [&](auto a) {
        call.template run_all<a()>(numbers(dv), numbers(dw1), numbers(dw2), numbers(db2));
      });
    };
    if (!half) return run_on(C{});
    if constexpr (!std::is_same_v<C, double>) incoming == ScalarType::BFloat16 ? run_on(bf16{}) : run_on(fp16{});
  });
  return {dweight, dv, dw1, dw2, db2};
}

}  // namespace
}  // namespace wx::mlp

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("filter_mlp_fwd", TORCH_BOX(&wx::mlp::forward));
  m.impl("filter_mlp_bwd", TORCH_BOX(&wx::mlp::backward));
}
