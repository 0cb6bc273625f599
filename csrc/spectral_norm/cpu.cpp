// Spectral normalization on the CPU; reference.py has the maths, rows.h the passes.
//
// A weight is a stack of slabs [a, m, b] in memory: `a` axes before dim, m = the size of dim, `b` after it. With a = 1
// (the usual case) the rows of W lie side by side, and one read gives t = W v and z = W't (u first). With a > 1
// (transposed convolutions) a slab gives a part of z and adds to all of t, so it is v first that takes one read.
//
// Work is cut into blocks whose size depends on the shape alone, and partial sums are added in the order of the blocks:
// the result does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/work.h"
#include "layout.h"
#include "rows.h"

namespace wx::sn {
namespace {

constexpr int64_t kPastCache = 24 << 20;  // outputs of a call from which stores go past the cache

template <class C>
double norm(const std::vector<C>& x) {
  double s = 0;
  for (C e : x) s += static_cast<double>(e) * static_cast<double>(e);
  return std::sqrt(s);
}

// s(sigma) and s'(sigma) of reference.py.
struct Scale {
  double s = 1, ds = 0;
  Scale(double sigma, std::optional<double> bound) {
    const double c = bound.value_or(1.0);
    if (std::isnan(sigma) || (bound ? sigma > c : sigma != 0)) s = c / sigma, ds = -c / (sigma * sigma);
  }
};

struct Options {
  double eps;
  bool v_first;
  std::optional<double> bound;
};

// One weight's forward, as a sequence of steps; each step is a number of blocks that may run in parallel.
template <class T, class O>
struct Forward {
  using C = Compute<T>;

  const T* w;
  O* out;
  Layout layout;
  const C *u0, *v0;
  C* state;
  double gain;
  int64_t n_iter;
  Options options;
  bool past_cache;

  // y belongs to the rows of the stored matrix, x to its columns: u and v, or v and u where it is stored transposed.
  std::vector<C> y_{}, x_{}, t_{}, z_{}, partial_{};
  double sigma_ = 0;

  int64_t bytes() const { return layout.numel() * static_cast<int64_t>(sizeof(T)); }

  template <class Parallel>  // parallel(n, f): f(0) ... f(n - 1)
  void run(const Parallel& parallel) {
    load_vectors();
    if (layout.numel() == 0) return store_state();
    for (int64_t i = 0; i < n_iter; i++) iterate(parallel);
    if (n_iter == 0) {
      left(parallel, x_);
      double s = 0;
      for (size_t i = 0; i < y_.size(); i++) s += static_cast<double>(y_[i]) * static_cast<double>(t_[i]);
      sigma_ = s;
    }
    if (n_iter && (!std::isfinite(sigma_) || sigma_ == 0)) load_vectors();
    store_state();
    const C s = static_cast<C>(Scale(static_cast<C>(sigma_), options.bound).s * gain);
    parallel(layout.blocks, [&](int64_t i) {
      const int64_t k = layout.blocks - 1 - i;  // last read, first in cache
      const int64_t at = layout.first_row(k) * layout.n;
      scale(w + at, out + at, layout.rows(k) * layout.n, s, past_cache);
    });
  }

  bool x_first() const { return options.v_first != layout.swapped; }
  int64_t u_size() const { return layout.swapped ? layout.n : layout.m; }
  int64_t v_size() const { return layout.swapped ? layout.m : layout.a * layout.n; }
  int64_t column(int64_t i) const { return layout.column.empty() ? i : layout.column[i]; }

  void load_vectors() {
    std::vector<C>&u = layout.swapped ? x_ : y_, &v = layout.swapped ? y_ : x_;
    u.assign(u0, u0 + u_size());
    v.resize(v_size());
    for (int64_t i = 0; i < v_size(); i++) v[i] = v0[column(i)];
  }

  void store_state() {
    const std::vector<C>&u = layout.swapped ? x_ : y_, &v = layout.swapped ? y_ : x_;
    std::copy(u.begin(), u.end(), state);
    for (int64_t i = 0; i < v_size(); i++) state[u_size() + column(i)] = v[i];
    state[u_size() + v_size()] = static_cast<C>(sigma_);
  }

  const T* block(int64_t k) const { return w + layout.first_row(k) * layout.n; }
  C* part(int64_t k, int64_t size) { return partial_.data() + k * size; }

  // t = W x
  template <class Parallel>
  void left(const Parallel& parallel, const std::vector<C>& x) {
    t_.resize(layout.m);
    if (layout.a == 1) {
      parallel(layout.blocks, [&](int64_t k) {
        std::vector<C> wide(widening());
        rows_dot(block(k), layout.rows(k), layout.n, x.data(), &t_[layout.first_row(k)], wide.data());
      });
    } else {
      partial_.assign(layout.blocks * layout.m, 0);
      parallel(layout.blocks, [&](int64_t k) { slabs(k, x.data(), nullptr, nullptr); });
      gather(parallel, t_);
    }
  }

  // z = W'y
  template <class Parallel>
  void right(const Parallel& parallel, const std::vector<C>& y) {
    z_.resize(layout.a * layout.n);
    if (layout.a == 1) {
      partial_.assign(layout.blocks * layout.n, 0);
      parallel(layout.blocks, [&](int64_t k) {
        std::vector<C> wide(widening());
        rows_axpy(block(k), layout.rows(k), layout.n, &y[layout.first_row(k)], part(k, layout.n), wide.data());
      });
      gather(parallel, z_);
    } else {
      std::fill(z_.begin(), z_.end(), C(0));
      parallel(layout.blocks, [&](int64_t k) { slabs(k, nullptr, y.data(), z_.data()); });
    }
  }

  // One read: t = W x and z = W't where a = 1; z = W'y and t = W z where a > 1.
  template <class Parallel>
  void both(const Parallel& parallel, const std::vector<C>& from) {
    t_.resize(layout.m);
    z_.resize(layout.a * layout.n);
    partial_.assign(layout.blocks * (layout.a == 1 ? layout.n : layout.m), 0);
    if (layout.a == 1) {
      parallel(layout.blocks, [&](int64_t k) {
        std::vector<C> wide(widening());
        rows_both(block(k), layout.rows(k), layout.n, from.data(), &t_[layout.first_row(k)], part(k, layout.n),
                  wide.data());
      });
      gather(parallel, z_);
    } else {
      std::fill(z_.begin(), z_.end(), C(0));
      parallel(layout.blocks, [&](int64_t k) { slabs(k, z_.data(), from.data(), z_.data()); });
      gather(parallel, t_);
    }
  }

  size_t widening() const { return std::is_same_v<T, C> ? 0 : 4 * layout.n; }

  // The slabs of block k: z = W'y where y is given, then the block's part of t = W x where x is.
  void slabs(int64_t k, const C* x, const C* y, C* z) {
    std::vector<C> wide(widening()), dots(layout.m);
    for (int64_t i = k * layout.per_block; i < k * layout.per_block + layout.count(k); i++) {
      const T* slab = w + i * layout.m * layout.n;
      if (y) rows_axpy(slab, layout.m, layout.n, y, z + i * layout.n, wide.data());
      if (!x) continue;
      rows_dot(slab, layout.m, layout.n, x + i * layout.n, dots.data(), wide.data());
      C* t = part(k, layout.m);
      for (int64_t r = 0; r < layout.m; r++) t[r] += dots[r];
    }
  }

  // The blocks' partial sums, in the order of the blocks.
  template <class Parallel>
  void gather(const Parallel& parallel, std::vector<C>& sum) {
    const auto size = static_cast<int64_t>(sum.size());
    const int64_t piece = 2048;
    parallel((size + piece - 1) / piece, [&](int64_t p) {
      const int64_t begin = p * piece, count = std::min(piece, size - begin);
      std::copy_n(part(0, size) + begin, count, &sum[begin]);
      for (int64_t k = 1; k < layout.blocks; k++)
        for (int64_t j = 0; j < count; j++) sum[begin + j] += part(k, size)[begin + j];
    });
  }

  // Sets x_, y_ and sigma_. The second vector comes from the first before that has unit length where one read gives both.
  template <class Parallel>
  void iterate(const Parallel& parallel) {
    const bool fused = x_first() == (layout.a > 1);
    std::vector<C>&from = x_first() ? y_ : x_, &first = x_first() ? z_ : t_, &second = x_first() ? t_ : z_;
    double unit_first = 0, norm_second = 0;
    if (fused) {
      both(parallel, from);
      double length = norm(first);
      int exponent = 0;
      if (length > 0 && std::isfinite(length) && (exponent = std::ilogb(length), std::abs(exponent) > kSafeExponent)) {
        std::vector<C> scaled(from);  // the square of W would leave the range of C
        for (C& e : scaled) e = std::ldexp(e, -exponent);
        both(parallel, scaled);
        length = norm(first);
      } else {
        exponent = 0;
      }
      unit_first = std::max(length, std::ldexp(options.eps, -exponent));
      norm_second = norm(second) / unit_first;
      for (C& e : second) e = static_cast<C>(e / unit_first);
    } else {
      x_first() ? right(parallel, from) : left(parallel, from);
      unit_first = std::max(norm(first), options.eps);
    }
    (x_first() ? x_ : y_).resize(first.size());
    for (size_t i = 0; i < first.size(); i++) (x_first() ? x_ : y_)[i] = static_cast<C>(first[i] / unit_first);
    if (!fused) {
      x_first() ? left(parallel, x_) : right(parallel, y_);
      norm_second = norm(second);
    }
    const double unit_second = std::max(norm_second, options.eps);
    (x_first() ? y_ : x_).resize(second.size());
    for (size_t i = 0; i < second.size(); i++) (x_first() ? y_ : x_)[i] = static_cast<C>(second[i] / unit_second);
    sigma_ = norm_second * norm_second / unit_second;
  }

  static constexpr int kSafeExponent = std::numeric_limits<C>::max_exponent / 3;
};

// One weight's backward.
template <class G, class T>
struct Backward {
  using C = Compute<T>;

  const G* g;
  const T* w;
  T* dw;
  Layout layout;
  const C* state;
  double gain;
  std::optional<double> bound;
  C* dgain;
  bool past_cache;

  int64_t bytes() const { return layout.numel() * static_cast<int64_t>(sizeof(T)); }

  template <class Parallel>
  void run(const Parallel& parallel) {
    const int64_t h = layout.swapped ? layout.n : layout.m, width = layout.swapped ? layout.m : layout.a * layout.n;
    std::vector<double> parts(layout.blocks);
    parallel(layout.blocks, [&](int64_t k) {
      const int64_t at = layout.first_row(k) * layout.n;
      parts[k] = inner(g + at, w + at, layout.rows(k) * layout.n);
    });
    double radial = 0;
    for (double p : parts) radial += p;
    const Scale scale(static_cast<double>(state[h + width]), bound);
    *dgain = static_cast<C>(scale.s * radial);
    const C p = static_cast<C>(gain * scale.s), q = static_cast<C>(gain * scale.ds * radial);

    std::vector<C> v(width);  // in the order of memory
    for (int64_t i = 0; i < width; i++) v[i] = state[h + (layout.column.empty() ? i : layout.column[i])];
    const C* rows = layout.swapped ? v.data() : state;
    const C* columns = layout.swapped ? state : v.data();
    parallel(layout.blocks, [&](int64_t i) {
      const int64_t k = layout.blocks - 1 - i, first = layout.first_row(k);
      for (int64_t r = first + layout.rows(k) - 1; r >= first; r--) {
        const int64_t slab = r / layout.m, row = r % layout.m, at = r * layout.n;
        update(g + at, columns + slab * layout.n, dw + at, layout.n, p, q * rows[row], past_cache);
      }
      stream_fence();
    });
  }
};

// f<T>(); T is the storage type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(fp16{});
    default: return f(bf16{});
  }
}

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "spectral_norm: ", what); }

double scalar(const Tensor& gain) {
  double value = 0;
  check(gain.numel() == 1 && is_float(gain.scalar_type()), "gain must hold one floating-point number");
  dispatch(gain.scalar_type(), [&](auto t) {
    value = static_cast<double>(widen(*static_cast<const decltype(t)*>(gain.data_ptr())));
  });
  return value;
}

void check_weights(const std::vector<Tensor>& weights, const std::vector<int64_t>& dims) {
  check(weights.size() == dims.size(), "weights and dims must be equally many");
  for (size_t i = 0; i < weights.size(); i++) {
    check(is_float(weights[i].scalar_type()), "weights must be float64, float32, bfloat16 or float16");
    check(weights[i].scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
    check(weights[i].is_cpu(), "weights must be on the CPU");
    check(0 <= dims[i] && dims[i] < weights[i].dim(), "dim is out of range");
  }
}

// Sizes of u and v together, and sigma.
int64_t state_size(const Tensor& weight, int64_t dim) {
  int64_t w = 1;
  for (int64_t i = 0; i < weight.dim(); i++) w *= i == dim ? 1 : weight.size(i);
  return weight.size(dim) + w + 1;
}

Tensor vector(int64_t n, ScalarType dtype) { return allocate({n}, {1}, dtype); }

std::tuple<std::vector<Tensor>, Tensor> forward_list(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                     std::vector<Tensor> vs, std::vector<Tensor> gains,
                                                     std::vector<int64_t> dims, std::vector<int64_t> n_iters,
                                                     double eps, bool v_first, std::optional<double> bound,
                                                     std::optional<ScalarType> out_dtype) {
  check(!weights.empty(), "weights must not be empty");
  check_weights(weights, dims);
  check(us.size() == weights.size() && vs.size() == weights.size() && n_iters.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "us, vs, n_iters and gains must be as many as weights");
  const ScalarType dtype = weights[0].scalar_type(), compute = opmath(dtype), result = out_dtype.value_or(dtype);
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  int64_t total = 0, out_bytes = 0;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < weights.size(); i++) {
    sizes.push_back(state_size(weights[i], dims[i]));
    total += sizes[i];
    out_bytes += weights[i].numel() * itemsize(result);
    check(us[i].scalar_type() == compute && vs[i].scalar_type() == compute && us[i].is_cpu() && vs[i].is_cpu(),
          "u and v must be on the CPU, float64 for float64 weights, else float32");
    check(us[i].numel() == weights[i].size(dims[i]) && us[i].numel() + vs[i].numel() + 1 == sizes[i],
          "u must have as many elements as the weight along dim, and v as many as along the other axes");
    check(n_iters[i] >= 0, "n_iter must not be negative");
  }
  const Tensor state = vector(total, compute);
  std::vector<Tensor> outs, held;
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    dispatch(result, [&](auto o) {
      using O = decltype(o);
      std::vector<Forward<T, O>> work;
      C* at = static_cast<C*>(state.data_ptr());
      for (size_t i = 0; i < weights.size(); i++) {
        const Tensor w = dense(weights[i]), u = torch::stable::contiguous(us[i]), v = torch::stable::contiguous(vs[i]);
        outs.push_back(allocate(to_dims(w.sizes()), to_dims(w.strides()), result));
        work.push_back({static_cast<const T*>(w.data_ptr()), static_cast<O*>(outs[i].data_ptr()), Layout(w, dims[i]),
                        static_cast<const C*>(u.data_ptr()), static_cast<const C*>(v.data_ptr()), at,
                        gains.empty() ? 1.0 : scalar(gains[i]), n_iters[i], {eps, v_first, bound},
                        out_bytes > kPastCache});
        at += sizes[i];
        held.insert(held.end(), {w, u, v});
      }
      run_all(work);
    });
  });
  return {outs, state};
}

std::tuple<std::vector<Tensor>, Tensor> backward_list(std::vector<Tensor> douts, std::vector<Tensor> weights,
                                                      Tensor state, std::vector<int64_t> offsets,
                                                      std::vector<Tensor> gains, std::vector<int64_t> dims,
                                                      std::optional<double> bound) {
  check(!weights.empty(), "weights must not be empty");
  check_weights(weights, dims);
  check(douts.size() == weights.size() && offsets.size() == weights.size() &&
            (gains.empty() || gains.size() == weights.size()),
        "douts, offsets and gains must be as many as weights");
  const ScalarType dtype = weights[0].scalar_type(), compute = opmath(dtype);
  check(state.scalar_type() == compute && state.is_cpu(), "state must be what the forward returned");
  ScalarType incoming = douts[0].scalar_type();
  int64_t out_bytes = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    check(douts[i].is_cpu() && to_dims(douts[i].sizes()) == to_dims(weights[i].sizes()),
          "douts must be on the CPU and have the shapes of the weights");
    check(offsets[i] >= 0 && offsets[i] + state_size(weights[i], dims[i]) <= state.numel(), "offset is out of range");
    if (douts[i].scalar_type() != incoming) incoming = dtype;
    out_bytes += weights[i].numel() * itemsize(dtype);
  }
  const bool half_into_float =
      dtype == ScalarType::Float && (incoming == ScalarType::BFloat16 || incoming == ScalarType::Half);
  if (!half_into_float) incoming = dtype;
  const Tensor flat = torch::stable::contiguous(state);
  const Tensor dgains = vector(static_cast<int64_t>(weights.size()), compute);
  std::vector<Tensor> dweights, held;
  const auto run = [&](auto g, auto t) {
    using G = decltype(g);
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Backward<G, T>> work;
    for (size_t i = 0; i < weights.size(); i++) {
      const Tensor w = dense(weights[i]), dout = with_strides(douts[i], to_dims(w.strides()), incoming);
      dweights.push_back(allocate(to_dims(w.sizes()), to_dims(w.strides()), dtype));
      work.push_back({static_cast<const G*>(dout.data_ptr()), static_cast<const T*>(w.data_ptr()),
                      static_cast<T*>(dweights[i].data_ptr()), Layout(w, dims[i]),
                      static_cast<const C*>(flat.data_ptr()) + offsets[i], gains.empty() ? 1.0 : scalar(gains[i]),
                      bound, static_cast<C*>(dgains.data_ptr()) + i, out_bytes > kPastCache});
      held.insert(held.end(), {w, dout});
    }
    run_all(work);
  };
  if (incoming == dtype)
    dispatch(dtype, [&](auto t) { run(t, t); });
  else if (incoming == ScalarType::BFloat16)
    run(bf16{}, float{});
  else
    run(fp16{}, float{});
  return {dweights, dgains};
}

std::vector<Tensor> list_of(const std::optional<Tensor>& gain) {
  return gain ? std::vector<Tensor>{*gain} : std::vector<Tensor>{};
}

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor u, Tensor v, std::optional<Tensor> gain, int64_t dim,
                                   int64_t n_iter, double eps, bool v_first, std::optional<double> bound,
                                   std::optional<ScalarType> out_dtype) {
  auto [outs, state] =
      forward_list({weight}, {u}, {v}, list_of(gain), {dim}, {n_iter}, eps, v_first, bound, out_dtype);
  return {outs[0], state};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor weight, Tensor state, std::optional<Tensor> gain, int64_t dim,
                                    std::optional<double> bound) {
  auto [dweights, dgains] = backward_list({dout}, {weight}, state, {0}, list_of(gain), {dim}, bound);
  return {dweights[0], torch::stable::select(dgains, 0, 0)};
}

}  // namespace
}  // namespace wx::sn

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("spectral_norm_fwd", TORCH_BOX(&wx::sn::forward));
  m.impl("spectral_norm_bwd", TORCH_BOX(&wx::sn::backward));
  m.impl("spectral_norm_fwd_list", TORCH_BOX(&wx::sn::forward_list));
  m.impl("spectral_norm_bwd_list", TORCH_BOX(&wx::sn::backward_list));
}
