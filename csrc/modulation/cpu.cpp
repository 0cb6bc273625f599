// Modulation on the CPU; reference.py has the maths.
//
// A group of output channels stays in cache: its energies and scales first, then a row of the output for each sample.
// Backward reads the output's gradient once. What belongs to the styles is added up over a block of output channels tap
// by tap, and over the taps only at the end of the block, so that no inner loop has to sum within a vector.
#include <optional>
#include <tuple>
#include <vector>

#include "../common/layout.h"
#include "../common/work.h"
#include "rows.h"

namespace wx::mod {
namespace {

constexpr int64_t kGroup = 4;         // output channels at a time
constexpr int64_t kBlock = 16;        // output channels of a partial sum of the styles' gradient
constexpr int64_t kChunk = 3072;      // bytes of a filter bank's row that stay in the first cache with their sums
constexpr int64_t kAlone = 64 << 10;  // numbers for which a second thread is not worth waking

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "modulate: ", what); }

template <class F>
void in_parallel(int64_t n, int64_t numbers, const F& f) {
  if (numbers <= kAlone)
    Alone()(n, f);
  else
    Threads()(n, f);
}

struct Shape {
  int64_t samples, outputs, inputs, taps, row;

  Shape(const Tensor& weight, const Tensor& style) {
    check(weight.is_cpu() && style.is_cpu(), "weight and style must be on the CPU");
    check(is_float(weight.scalar_type()), "weight must be float64, float32, bfloat16 or float16");
    check(style.scalar_type() == opmath(weight.scalar_type()),
          "style must be float64 for a float64 weight, else float32");
    check(weight.dim() == 3 && style.dim() == 2 && style.size(1) == weight.size(1),
          "weight must be [O, I, K] and style [N, I]");
    samples = style.size(0), outputs = weight.size(0), inputs = weight.size(1), taps = weight.size(2);
    row = inputs * taps;
  }
  int64_t numbers() const { return samples * outputs * row; }
};

// What every output channel needs of the styles.
template <class C>
struct Styles {
  std::vector<C> squares;  // [N, I]
  Scratch<C> repeated;     // [N, I K]
  const C* by_tap;

  Styles(const Shape& at, const C* style) : squares(at.samples * at.inputs), repeated(at.samples * at.row) {
    for (size_t k = 0; k < squares.size(); k++) squares[k] = style[k] * style[k];
    by_tap = repeated.data();
    in_parallel(at.samples, at.samples * at.row, [&](int64_t n) {
      run<Expanded<C>>(style + n * at.inputs, at.inputs, at.taps, repeated.data() + n * at.row);
    });
  }
};

// Rows of the weight in the dtype of the sums: where they lie, or a copy.
template <class C, class T>
const C* widened(const T* from, int64_t n, std::vector<C>& copy) {
  if constexpr (std::is_same_v<C, T>) {
    return from;
  } else {
    copy.resize(n);
    run<Widened<C, T>>(from, n, copy.data());
    return copy.data();
  }
}

template <class T, class O>
void modulated(const Shape& at, const T* weight, const Compute<T>* style, bool demodulate, double eps, O* out,
               Compute<T>* d) {
  using C = Compute<T>;
  const Styles<C> styles(at, style);
  const bool past_cache = at.numbers() * static_cast<int64_t>(sizeof(O)) >= kPastCache;
  in_parallel((at.outputs + kGroup - 1) / kGroup, at.numbers(), [&](int64_t group) {
    const int64_t first = group * kGroup, count = std::min(kGroup, at.outputs - first);
    std::vector<C> copy, energy(at.inputs);
    const C* w = widened(weight + first * at.row, count * at.row, copy);
    for (int64_t r = 0; r < count; r++) {
      C* to = d + first + r;
      if (demodulate) {
        run<TapSums<C, true>>(w + r * at.row, at.inputs, at.taps, energy.data());
        run<Scales<C>>(styles.squares.data(), static_cast<const C*>(energy.data()), at.samples, at.inputs,
                       static_cast<C>(eps), to, at.outputs);
      } else {
        for (int64_t n = 0; n < at.samples; n++) to[n * at.outputs] = C(1);
      }
    }
    for (int64_t n = 0; n < at.samples; n++)
      for (int64_t o = first; o < first + count; o++)
        run<Modulated<C, O>>(w + (o - first) * at.row, styles.by_tap + n * at.row, d[n * at.outputs + o],
                             out + (n * at.outputs + o) * at.row, at.row, past_cache);
    if (past_cache) stream_fence();
  });
}

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor style, bool demodulate, double eps,
                                   std::optional<ScalarType> out_dtype) {
  const Shape at(weight, style);
  const ScalarType dtype = weight.scalar_type(), result = out_dtype.value_or(dtype);
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  const Tensor w = packed(weight), s = packed(style);
  const Tensor out = contiguous({at.samples, at.outputs, at.inputs, at.taps}, result);
  const Tensor d = contiguous({at.samples, at.outputs}, style.scalar_type());
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    dispatch(result, [&](auto o) {
      using O = decltype(o);
      modulated(at, static_cast<const T*>(w.data_ptr()), static_cast<const Compute<T>*>(s.data_ptr()), demodulate, eps,
                static_cast<O*>(out.data_ptr()), static_cast<Compute<T>*>(d.data_ptr()));
    });
  });
  return {out, d};
}

template <class T, class G>
struct Backward {
  using C = Compute<T>;
  const Shape& at;
  const G* grad;
  const T* weight;
  const C *style, *d;
  bool demodulate;
  T* dweight;  // or null
  C* dstyle;   // or null
  Styles<C> styles;

  // The sums of the output channels [first, first + count); `part` [N, I] is theirs.
  void block(int64_t first, int64_t count, C* part) const {
    std::vector<C> copy, b(at.samples * count), t(at.samples * count);
    const C* w = widened(weight + first * at.row, count * at.row, copy);
    const int64_t per_chunk =
        std::max<int64_t>(1, kChunk / static_cast<int64_t>(sizeof(C) * std::max<int64_t>(1, at.taps)));
    const int64_t chunks = (at.inputs + per_chunk - 1) / per_chunk;
    const Scratch<C> sums(count * at.row), z(at.samples * std::min(per_chunk, at.inputs) * at.taps);
    std::fill(sums.data(), sums.data() + count * at.row, C(0));
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t low = c * at.inputs / chunks, channels = (c + 1) * at.inputs / chunks - low, n = channels * at.taps;
      std::fill(z.data(), z.data() + at.samples * n, C(0));
      for (int64_t r = 0; r < count; r += kGroup)
        for (int64_t k = 0; k < at.samples; k++)
          rows(first, r, std::min(kGroup, count - r), k, low * at.taps, n, w, sums.data(), z.data() + k * n,
               b.data() + k * count);
      for (int64_t k = 0; k < at.samples && dstyle; k++)
        run<TapSums<C, false>>(static_cast<const C*>(z.data()) + k * n, channels, at.taps, part + k * at.inputs + low);
    }
    if (demodulate)
      for (int64_t k = 0; k < at.samples; k++)
        for (int64_t r = 0; r < count; r++) {
          const C scale = d[k * at.outputs + first + r];
          t[k * count + r] = scale * scale * scale * b[k * count + r];
        }
    if (dstyle && demodulate) add_energy(count, w, t, part);
    if (dweight) finish(first, count, w, t, sums.data());
  }

  // Sample k, columns [low, low + n) of `count` output channels from first + r on.
  void rows(int64_t first, int64_t r, int64_t count, int64_t k, int64_t low, int64_t n, const C* w, C* sums, C* z,
            C* b) const {
    const int64_t at_row = first + r;
    const G* g = grad + (k * at.outputs + at_row) * at.row + low;
    const C *scale = d + k * at.outputs + at_row, *s = styles.by_tap + k * at.row + low;
    const int64_t ahead = k + 1 < at.samples ? at.outputs * at.row : 0;
    if (count == kGroup) {
      run<Gradients<C, G, kGroup>>(g, at.row, w + r * at.row + low, sums + r * at.row + low, at.row, scale, s, z, b + r,
                                   n, ahead);
    } else {
      for (int64_t i = 0; i < count; i++)
        run<Gradients<C, G, 1>>(g + i * at.row, at.row, w + (r + i) * at.row + low, sums + (r + i) * at.row + low,
                                at.row, scale + i, s, z, b + r + i, n, ahead);
    }
  }

  // part[n, i] -= style[n, i] sum over o of  t[n, o] E[o, i]
  void add_energy(int64_t count, const C* w, const std::vector<C>& t, C* part) const {
    std::vector<C> energy(count * at.inputs), sum(at.inputs);
    run<TapSums<C, true>>(w, count * at.inputs, at.taps, energy.data());
    for (int64_t k = 0; k < at.samples; k++) {
      std::fill(sum.begin(), sum.end(), C(0));
      run<AddRows<C>>(t.data() + k * count, int64_t{1}, static_cast<const C*>(energy.data()), count, at.inputs,
                      sum.data());
      for (int64_t i = 0; i < at.inputs; i++) part[k * at.inputs + i] -= style[k * at.inputs + i] * sum[i];
    }
  }

  void finish(int64_t first, int64_t count, const C* w, const std::vector<C>& t, const C* sums) const {
    std::vector<C> c(at.inputs);
    for (int64_t r = 0; r < count; r++) {
      std::fill(c.begin(), c.end(), C(0));
      if (demodulate) run<AddRows<C>>(t.data() + r, count, styles.squares.data(), at.samples, at.inputs, c.data());
      run<Corrected<C, T>>(sums + r * at.row, w + r * at.row, static_cast<const C*>(c.data()), at.inputs, at.taps,
                           dweight + (first + r) * at.row);
    }
  }

  void run_all() const {
    const int64_t blocks = (at.outputs + kBlock - 1) / kBlock, n = at.samples * at.inputs;
    const Scratch<C> parts(dstyle ? blocks * n : 0);
    in_parallel(blocks, at.numbers(), [&](int64_t k) {
      block(k * kBlock, std::min(kBlock, at.outputs - k * kBlock), dstyle ? parts.data() + k * n : nullptr);
    });
    for (int64_t j = 0; j < n && dstyle; j++) {
      double sum = 0;
      for (int64_t k = 0; k < blocks; k++) sum += static_cast<double>(parts.data()[k * n + j]);
      dstyle[j] = static_cast<C>(sum);
    }
  }
};

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor weight, Tensor style, Tensor d, bool demodulate,
                                    bool need_weight, bool need_style) {
  const Shape at(weight, style);
  const ScalarType dtype = weight.scalar_type(), wide = opmath(dtype), incoming = grad.scalar_type();
  check(grad.is_cpu() && grad.dim() == 4 && to_dims(grad.sizes()) == Dims({at.samples, at.outputs, at.inputs, at.taps}),
        "grad must be [N, O, I, K]");
  check(d.scalar_type() == wide && to_dims(d.sizes()) == Dims({at.samples, at.outputs}),
        "d must be what the forward returned");
  const bool half = wide == ScalarType::Float && (incoming == ScalarType::BFloat16 || incoming == ScalarType::Half);
  const Tensor g = with_strides(grad, contiguous_strides(to_dims(grad.sizes())), half ? incoming : wide);
  const Tensor w = packed(weight), s = packed(style), scales = packed(d);
  const Tensor dweight = need_weight ? contiguous(to_dims(w.sizes()), dtype) : contiguous({0}, dtype);
  const Tensor dstyle = need_style ? contiguous(to_dims(s.sizes()), wide) : contiguous({0}, wide);
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const auto run_on = [&](auto e) {
      using G = decltype(e);
      const C* from = static_cast<const C*>(s.data_ptr());
      Backward<T, G>{at,
                     static_cast<const G*>(g.data_ptr()),
                     static_cast<const T*>(w.data_ptr()),
                     from,
                     static_cast<const C*>(scales.data_ptr()),
                     demodulate,
                     need_weight ? static_cast<T*>(dweight.data_ptr()) : nullptr,
                     need_style ? static_cast<C*>(dstyle.data_ptr()) : nullptr,
                     Styles<C>(at, from)}
          .run_all();
    };
    if (!half) return run_on(C{});
    if constexpr (!std::is_same_v<C, double>) incoming == ScalarType::BFloat16 ? run_on(bf16{}) : run_on(fp16{});
  });
  return {dweight, dstyle};
}

}  // namespace
}  // namespace wx::mod

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("modulate_fwd", TORCH_BOX(&wx::mod::forward));
  m.impl("modulate_bwd", TORCH_BOX(&wx::mod::backward));
}
