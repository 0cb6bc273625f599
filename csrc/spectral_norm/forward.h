// One weight's forward on the CPU; reference.py has the maths, rows.h the passes, layout.h the words.
//
// With a = 1 (the usual case) the rows of W lie side by side, and one read gives t = W v and z = W't (u first). With
// a > 1 (transposed convolutions) a slab gives a part of z and adds to all of t, so it is v first that takes one read.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../common/layout.h"
#include "rows.h"
#include "scale.h"

namespace wx::sn {

template <class C>
double norm(const std::vector<C>& x) {
  double s[8] = {};
  size_t i = 0;
  for (; i + 8 <= x.size(); i += 8)
    for (size_t k = 0; k < 8; k++) s[k] += static_cast<double>(x[i + k]) * static_cast<double>(x[i + k]);
  for (; i < x.size(); i++) s[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
}

template <class C>
void divide(const std::vector<C>& x, double by, std::vector<C>& out) {
  out.resize(x.size());
  for (size_t i = 0; i < x.size(); i++) out[i] = static_cast<C>(static_cast<double>(x[i]) / by);
}

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
  O* out;  // none: only the state is wanted
  Layout layout;
  const C *u0, *v0;
  C* state;
  double gain;
  int64_t n_iter;
  Options options;
  bool past_cache;

  // y belongs to the rows of the stored matrix, x to its columns: u and v, or v and u where it is stored transposed.
  std::vector<C> y_{}, x_{}, t_{}, z_{};
  Scratch<C> partial_{};  // a sum of each block; each block begins with zeros
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
    partial_ = Scratch<C>();
    store_state();
    if (!out) return;
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
  C* zero_part(int64_t k, int64_t size) {
    std::fill_n(part(k, size), size, C(0));
    return part(k, size);
  }

  // t = W x
  template <class Parallel>
  void left(const Parallel& parallel, const std::vector<C>& x) {
    t_.resize(layout.m);
    if (layout.a == 1) {
      parallel(layout.blocks, [&](int64_t k) {
        const Scratch<C> wide(widening());
        rows_dot(block(k), layout.rows(k), layout.n, x.data(), &t_[layout.first_row(k)], wide.data());
      });
    } else {
      partial_ = Scratch<C>(layout.blocks * layout.m);
      parallel(layout.blocks, [&](int64_t k) { slabs(k, x.data(), nullptr, nullptr); });
      gather(parallel, t_);
    }
  }

  // z = W'y
  template <class Parallel>
  void right(const Parallel& parallel, const std::vector<C>& y) {
    z_.resize(layout.a * layout.n);
    if (layout.a == 1) {
      partial_ = Scratch<C>(layout.blocks * layout.n);
      parallel(layout.blocks, [&](int64_t k) {
        const Scratch<C> wide(widening());
        rows_axpy(block(k), layout.rows(k), layout.n, &y[layout.first_row(k)], zero_part(k, layout.n), wide.data());
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
    partial_ = Scratch<C>(layout.blocks * (layout.a == 1 ? layout.n : layout.m));
    if (layout.a == 1) {
      parallel(layout.blocks, [&](int64_t k) {
        const Scratch<C> wide(widening());
        rows_both(block(k), layout.rows(k), layout.n, from.data(), &t_[layout.first_row(k)], zero_part(k, layout.n),
                  wide.data());
      });
      gather(parallel, z_);
    } else {
      std::fill(z_.begin(), z_.end(), C(0));
      parallel(layout.blocks, [&](int64_t k) { slabs(k, z_.data(), from.data(), z_.data()); });
      gather(parallel, t_);
    }
  }

  int64_t widening() const { return std::is_same_v<T, C> ? 0 : 4 * layout.n; }

  // The slabs of block k: z = W'y where y is given, then the block's part of t = W x where x is.
  void slabs(int64_t k, const C* x, const C* y, C* z) {
    const Scratch<C> wide(widening()), dots(layout.m);
    C* t = x ? zero_part(k, layout.m) : nullptr;
    for (int64_t i = k * layout.per_block; i < k * layout.per_block + layout.count(k); i++) {
      const T* slab = w + i * layout.m * layout.n;
      if (y) rows_axpy(slab, layout.m, layout.n, y, z + i * layout.n, wide.data());
      if (!x) continue;
      rows_dot(slab, layout.m, layout.n, x + i * layout.n, dots.data(), wide.data());
      for (int64_t r = 0; r < layout.m; r++) t[r] += dots.data()[r];
    }
  }

  // The blocks' partial sums, in the order of the blocks.
  template <class Parallel>
  void gather(const Parallel& parallel, std::vector<C>& sum) {
    const auto size = static_cast<int64_t>(sum.size());
    const int64_t piece = 1024;
    parallel((size + piece - 1) / piece, [&](int64_t p) {
      const int64_t begin = p * piece, count = std::min(piece, size - begin);
      std::copy_n(part(0, size) + begin, count, &sum[begin]);
      for (int64_t k = 1; k < layout.blocks; k++)
        for (int64_t j = 0; j < count; j++) sum[begin + j] += part(k, size)[begin + j];
    });
  }

  // Sets x_, y_ and sigma_. The second vector comes from the first before that has unit length where one read gives
  // both.
  template <class Parallel>
  void iterate(const Parallel& parallel) {
    const bool fused = x_first() == (layout.a > 1);
    std::vector<C>&from = x_first() ? y_ : x_, &first = x_first() ? z_ : t_, &second = x_first() ? t_ : z_;
    std::vector<C>&to_first = x_first() ? x_ : y_, &to_second = x_first() ? y_ : x_;
    double norm_second = 0;
    if (fused) {
      both(parallel, from);
      double length = norm(first);
      int exponent = length > 0 && std::isfinite(length) ? std::ilogb(length) : 0;
      if (std::abs(exponent) > kSafeExponent) {  // the square of W would leave the range of C: once more, scaled
        std::vector<C> scaled(from);
        for (C& e : scaled) e = std::ldexp(e, -exponent);
        both(parallel, scaled);
        length = norm(first);
      } else {
        exponent = 0;
      }
      const double unit = std::max(length, std::ldexp(options.eps, -exponent));
      norm_second = norm(second) / unit;
      divide(first, unit, to_first);
      divide(second, unit * std::max(norm_second, options.eps), to_second);
    } else {
      x_first() ? right(parallel, from) : left(parallel, from);
      divide(first, std::max(norm(first), options.eps), to_first);
      x_first() ? left(parallel, x_) : right(parallel, y_);
      norm_second = norm(second);
      divide(second, std::max(norm_second, options.eps), to_second);
    }
    sigma_ = norm_second * norm_second / std::max(norm_second, options.eps);
  }

  static constexpr int kSafeExponent = std::numeric_limits<C>::max_exponent / 3;
};

}  // namespace wx::sn
