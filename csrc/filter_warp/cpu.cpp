// Filter warps on the CPU; reference.py has the maths.
//
// A run of tiles is brought into L2, tap by tap, and meets every condition there, a chunk of it at a time in L1: the
// weight is read once, and so is each gradient, which gives its part of both results. With the taps of all banks one
// after another ("sources") the sum over banks is a sum over taps. Gram matrices are summed lane by lane over a run,
// then over lanes, over the runs of a block, and over blocks; all are cut by the shape alone.
#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/layout.h"
#include "../common/work.h"
#include "gram.h"
#include "map.h"
#include "run.h"

namespace wx::fw {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "filter_warp: ", what); }

constexpr int64_t kChunkBytes = 24 << 10;  // of the weight's tiles that meet a condition at a time: half of L1
constexpr int64_t kRunBytes = 192 << 10;   // of those that stay in L2 for all conditions
constexpr int64_t kRunTiles = 64;          // 36 KiB of 3 x 3 kernels in one piece: shorter ones are read more slowly
constexpr int64_t kWake = 1 << 18;         // products that are worth a second thread

struct Shape {
  int64_t batch, banks, filters, taps, sources, tiles;
  int64_t chunk, run;  // tiles; a run is whole chunks

  Shape(const Tensor& weight, const Tensor& a)
      : batch(a.size(0)),
        banks(weight.size(0)),
        filters(weight.size(1)),
        taps(weight.size(2)),
        sources(banks * taps),
        tiles((filters + kFilters - 1) / kFilters) {
    const int64_t bytes = kFilters * std::max<int64_t>(1, sources) * itemsize(a.scalar_type());
    chunk = std::clamp<int64_t>(kChunkBytes / bytes, 2, 16);
    const int64_t most = std::clamp<int64_t>(kRunBytes / bytes, 2, kRunTiles);
    run = std::max<int64_t>(1, std::min(most, tiles / 16) / chunk) * chunk;
  }
  int64_t count(int64_t first, int64_t most) const { return std::min(most, tiles - first); }
  // Of `count` tiles: the last one may be short.
  int64_t filters_in(int64_t first, int64_t count) const {
    return std::min((first + count) * kFilters, filters) - first * kFilters;
  }
  bool small() const { return batch * filters * taps * sources < kWake; }
};

template <class F>
void spread(bool small, int64_t n, const F& f) {
  small ? Alone()(n, f) : Threads()(n, f);
}

void check_inputs(const Tensor& weight, const Tensor& a) {
  check(weight.is_cpu() && a.is_cpu(), "weight and a must be on the CPU");
  check(is_float(weight.scalar_type()), "weight must be float64, float32, bfloat16 or float16");
  check(a.scalar_type() == opmath(weight.scalar_type()), "a must be float64 for a float64 weight, else float32");
  check(weight.dim() == 3 && a.dim() == 4, "weight must be [E, F, K] and a [B, E, K, K]");
  check(a.size(1) == weight.size(0) && a.size(2) == weight.size(2) && a.size(3) == weight.size(2),
        "a must be [B, E, K, K] for a weight [E, F, K]");
}

// The matrices of all conditions: [K, E K], or their adjoints [E K, K].
template <class C>
Maps<C> maps_of(const Shape& of, const C* a, bool adjoint) {
  const auto at = [=](int64_t b, int64_t p, int64_t s) {
    return a[(b * of.sources + s / of.taps * of.taps + p) * of.taps + s % of.taps];
  };
  const auto make = [&](const auto& parallel) {
    return adjoint ? Maps<C>(parallel, of.batch, of.sources, of.taps,
                             [&](int64_t b, int64_t s, int64_t p) { return at(b, p, s); })
                   : Maps<C>(parallel, of.batch, of.taps, of.sources, at);
  };
  return of.batch * of.taps * of.sources < kWake ? make(Alone()) : make(Threads());
}

// The tiles [first, first + count) of all banks, [tiles][sources][16].
template <class C, class T>
void read_banks(const Shape& of, Run<C>& run, const T* weight, int64_t first, int64_t count, C* to) {
  for (int64_t e = 0; e < of.banks; e++)
    run.read(weight + (e * of.filters + first * kFilters) * of.taps, of.filters_in(first, count),
             to + e * of.taps * kFilters, of.sources * kFilters);
}

template <class T, class O>
void forward_all(const Shape& of, const T* weight, const Compute<T>* a, O* out) {
  using C = Compute<T>;
  const Maps<C> maps = maps_of(of, a, false);
  const bool past = of.batch * of.filters * of.taps * static_cast<int64_t>(sizeof(O)) >= kPastCache;
  spread(of.small(), (of.tiles + of.chunk - 1) / of.chunk, [&](int64_t k) {
    const int64_t first = k * of.chunk, count = of.count(first, of.chunk);
    Run<C> run(of.taps, of.chunk);
    const Lines<C> w(of.chunk * of.sources * kFilters), result(of.chunk * of.taps * kFilters);
    read_banks(of, run, weight, first, count, w.data());
    for (int64_t b = 0; b < of.batch; b++) {
      maps.template apply<false>(b, w.data(), count, result.data());
      run.write(result.data(), of.taps * kFilters, of.filters_in(first, count),
                out + (b * of.filters + first * kFilters) * of.taps, past);
    }
    if (past) stream_fence();
  });
}

// The runs of a block, one after another: its part of da [B][K][sources] is added to `gram`, and its dweight written.
// Null: not needed.
template <class T, class D>
void backward_block(const Shape& of, const D* grad, const T* weight, const Maps<Compute<T>>* adjoints, int64_t begin,
                    int64_t end, Compute<T>* gram, T* dweight) {
  using C = Compute<T>;
  const int64_t tile = of.sources * kFilters, matrix = of.taps * of.sources;
  Run<C> run(of.taps, of.chunk);
  const Lines<C> g(of.chunk * of.taps * kFilters), w(gram ? of.run * tile : 0), dw(dweight ? of.run * tile : 0),
      sums(gram ? matrix * kFilters : 0);
  for (int64_t start = begin; start < end; start += of.run) {
    const int64_t tiles = std::min(of.run, end - start);
    if (gram) read_banks(of, run, weight, start, tiles, w.data());
    if (dweight) std::fill_n(dw.data(), tiles * tile, C(0));
    for (int64_t b = 0; b < of.batch; b++) {
      if (gram) std::fill_n(sums.data(), matrix * kFilters, C(0));
      for (int64_t t = 0; t < tiles; t += of.chunk) {
        const int64_t first = start + t, count = std::min(of.chunk, tiles - t);
        const D* from = grad + (b * of.filters + first * kFilters) * of.taps;
        const D* next = t + of.chunk < tiles ? from + count * kFilters * of.taps
                        : b + 1 < of.batch   ? grad + ((b + 1) * of.filters + start * kFilters) * of.taps
                                             : nullptr;
        const Ahead ahead{reinterpret_cast<const char*>(next), sizeof(D)};
        run.read(from, of.filters_in(first, count), g.data(), of.taps * kFilters);
        if (!gram && ahead.at) ahead.ask(0, count * kFilters * of.taps, ahead.item);
        if (dweight) adjoints->template apply<true>(b, g.data(), count, dw.data() + t * tile);
        if (gram)
          wx::run<Gram<C>>(g.as_const(), of.taps, w.as_const() + t * tile, of.sources, count, sums.data(), ahead);
      }
      if (gram) wx::run<LaneSums<C>>(sums.as_const(), matrix, gram + b * matrix);
    }
    for (int64_t e = 0; dweight && e < of.banks; e++)
      run.write(dw.data() + e * of.taps * kFilters, tile, of.filters_in(start, tiles),
                dweight + (e * of.filters + start * kFilters) * of.taps, false);
  }
}

template <class T, class D>
void backward_all(const Shape& of, const D* grad, const T* weight, const Compute<T>* a, T* dweight, Compute<T>* da) {
  using C = Compute<T>;
  // Partial sums are at most a sixteenth of the gradient.
  const int64_t wanted = std::max({of.sources, (of.tiles + kMaxBlocks - 1) / kMaxBlocks, int64_t{1}});
  const int64_t per_block = (wanted + of.run - 1) / of.run * of.run;
  const int64_t blocks = (of.tiles + per_block - 1) / per_block, numel = of.batch * of.taps * of.sources;
  const Lines<C> partial(da ? blocks * numel : 0);
  std::optional<Maps<C>> adjoints;
  if (dweight) adjoints.emplace(maps_of(of, a, true));
  spread(of.small(), blocks, [&](int64_t k) {
    C* gram = da ? partial.data() + k * numel : nullptr;
    if (gram) std::fill_n(gram, numel, C(0));
    backward_block(of, grad, weight, adjoints ? &*adjoints : nullptr, k * per_block,
                   std::min(of.tiles, (k + 1) * per_block), gram, dweight);
  });
  if (!da) return;
  spread(blocks * numel < kWake, of.batch * of.taps, [&](int64_t row) {  // [B][K][E K] to [B][E][K][K]
    const int64_t b = row / of.taps, p = row % of.taps;
    for (int64_t s = 0; s < of.sources; s++) {
      double sum = 0;
      for (int64_t k = 0; k < blocks; k++) sum += static_cast<double>(partial.data()[k * numel + row * of.sources + s]);
      da[((b * of.banks + s / of.taps) * of.taps + p) * of.taps + s % of.taps] = static_cast<C>(sum);
    }
  });
}

Tensor forward(Tensor weight, Tensor a, std::optional<ScalarType> out_dtype) {
  check_inputs(weight, a);
  const ScalarType result = out_dtype.value_or(weight.scalar_type());
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  const Shape of(weight, a);
  const Tensor w = packed(weight), matrices = packed(a);
  const Tensor out = contiguous({of.batch, of.filters, of.taps}, result);
  dispatch(weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    dispatch(result, [&](auto o) {
      forward_all<T>(of, static_cast<const T*>(w.data_ptr()), static_cast<const Compute<T>*>(matrices.data_ptr()),
                     static_cast<decltype(o)*>(out.data_ptr()));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor weight, Tensor a, bool need_weight, bool need_a) {
  check_inputs(weight, a);
  const Shape of(weight, a);
  check(grad.is_cpu() && is_float(grad.scalar_type()) && to_dims(grad.sizes()) == Dims{of.batch, of.filters, of.taps},
        "grad must be float64, float32, bfloat16 or float16 and [B, F, K], on the CPU");
  const Tensor g = packed(grad), w = packed(weight), matrices = packed(a);
  const Dims none{0};
  const Tensor dweight = contiguous(need_weight ? Dims{of.banks, of.filters, of.taps} : none, weight.scalar_type());
  const Tensor da = contiguous(need_a ? Dims{of.batch, of.banks, of.taps, of.taps} : none, a.scalar_type());
  dispatch(weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    dispatch(g.scalar_type(), [&](auto d) {
      backward_all<T>(of, static_cast<const decltype(d)*>(g.data_ptr()), static_cast<const T*>(w.data_ptr()),
                      static_cast<const C*>(matrices.data_ptr()),
                      need_weight ? static_cast<T*>(dweight.data_ptr()) : nullptr,
                      need_a ? static_cast<C*>(da.data_ptr()) : nullptr);
    });
  });
  return {dweight, da};
}

}  // namespace
}  // namespace wx::fw

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("filter_warp_fwd", TORCH_BOX(&wx::fw::forward));
  m.impl("filter_warp_bwd", TORCH_BOX(&wx::fw::backward));
}
