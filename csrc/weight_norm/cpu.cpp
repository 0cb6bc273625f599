// Weight normalization on the CPU; reference.py has the maths, layout.h the words.
//
// A row that lies in one piece is read, and written while it is in cache. Otherwise (dim is not the slowest axis) one
// pass adds up the rows' sums, a second writes.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/layout.h"
#include "../common/work.h"

namespace wx::wn {
namespace {

template <class A, class B>
WX_INLINE double product_body(const A* a, const B* b, int64_t n) {
  constexpr int64_t kChunk = 512, kParts = 16;
  double sum = 0;
  for (int64_t j = 0; j < n; j += kChunk) {
    Compute<B> part[kParts] = {};
    const int64_t end = j + kChunk < n ? j + kChunk : n;
    int64_t i = j;
    for (; i + kParts <= end; i += kParts)
      for (int64_t k = 0; k < kParts; k++)
        part[k] += static_cast<Compute<B>>(widen(a[i + k])) * static_cast<Compute<B>>(widen(b[i + k]));
    for (; i < end; i++) part[0] += static_cast<Compute<B>>(widen(a[i])) * static_cast<Compute<B>>(widen(b[i]));
    for (Compute<B> p : part) sum += static_cast<double>(p);
  }
  return sum;
}

// product: sum of a b.  add_products: sums[j] += a[j] b[j].
// combine: out = p d + q w for one row, or with p[j] and q[j] where rows are columns in memory; d may be null (then 0).
#define WX_PAIR(D, T)                                                                                                 \
  WX_CLONES double product(const D* a, const T* b, int64_t n) { return product_body(a, b, n); }                       \
  WX_CLONES void add_products(const D* a, const T* b, double* sums, int64_t n) {                                      \
    for (int64_t j = 0; j < n; j++) sums[j] += static_cast<double>(widen(a[j])) * static_cast<double>(widen(b[j]));   \
  }                                                                                                                   \
  WX_CLONES void combine(const D* d, const T* w, T* out, int64_t n, Compute<T> p, Compute<T> q) {                     \
    for (int64_t j = 0; j < n; j++) narrow(p * static_cast<Compute<T>>(widen(d[j])) + q * widen(w[j]), out[j]);       \
  }                                                                                                                   \
  WX_CLONES void combine(const D* d, const T* w, T* out, int64_t n, const Compute<T>* p, const Compute<T>* q) {       \
    for (int64_t j = 0; j < n; j++) narrow(p[j] * static_cast<Compute<T>>(widen(d[j])) + q[j] * widen(w[j]), out[j]); \
  }
#define WX_SCALE(T, O)                                                       \
  WX_CLONES void scale(const T* w, O* out, int64_t n, Compute<T> s) {        \
    for (int64_t j = 0; j < n; j++) narrow(s * widen(w[j]), out[j]);         \
  }                                                                          \
  WX_CLONES void scale(const T* w, O* out, int64_t n, const Compute<T>* s) { \
    for (int64_t j = 0; j < n; j++) narrow(s[j] * widen(w[j]), out[j]);      \
  }
WX_FOR_GRADIENTS(WX_PAIR)
WX_FOR_OUTPUTS(WX_SCALE)
#undef WX_PAIR
#undef WX_SCALE

// For each row i of the matrix: finish(i, <a_i, b_i>), then write(first number, count, i) for its pieces in memory;
// where rows are columns in memory, write_all(first number) for each stored row.
template <class A, class B, class Finish, class Write, class WriteAll>
void by_row(const Layout& at, const A* a, const B* b, const Finish& finish, const Write& write,
            const WriteAll& write_all) {
  const Threads parallel{};
  const int64_t rows = at.swapped ? at.n : at.m;
  if (at.a == 1 && !at.swapped) {
    parallel(at.blocks, [&](int64_t k) {
      for (int64_t r = at.first_row(k); r < at.first_row(k) + at.rows(k); r++) {
        finish(r, product(a + r * at.n, b + r * at.n, at.n));
        write(r * at.n, at.n, r);
      }
    });
    return;
  }
  std::vector<double> partial(at.blocks * rows);
  parallel(at.blocks, [&](int64_t k) {
    double* sums = partial.data() + k * rows;
    for (int64_t r = at.first_row(k); r < at.first_row(k) + at.rows(k); r++) {
      if (at.swapped)
        add_products(a + r * at.n, b + r * at.n, sums, at.n);
      else
        sums[r % at.m] += product(a + r * at.n, b + r * at.n, at.n);
    }
  });
  for (int64_t i = 0; i < rows; i++) {
    double sum = 0;
    for (int64_t k = 0; k < at.blocks; k++) sum += partial[k * rows + i];
    finish(i, sum);
  }
  parallel(at.blocks, [&](int64_t k) {
    for (int64_t r = at.first_row(k); r < at.first_row(k) + at.rows(k); r++)
      at.swapped ? write_all(r * at.n) : write(r * at.n, at.n, r % at.m);
  });
}

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "weight_norm: ", what); }

void check_inputs(const Tensor& weight, const Tensor& g, int64_t dim) {
  check(weight.is_cpu() && g.is_cpu(), "weight and g must be on the CPU");
  check(is_float(weight.scalar_type()), "weight must be float64, float32, bfloat16 or float16");
  check(0 <= dim && dim < weight.dim(), "dim is out of range");
  check(g.scalar_type() == opmath(weight.scalar_type()), "g must be float64 for a float64 weight, else float32");
  check(g.numel() == weight.size(dim), "g must have as many elements as the weight along dim");
}

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor g, int64_t dim, std::optional<ScalarType> out_dtype) {
  check_inputs(weight, g, dim);
  const ScalarType dtype = weight.scalar_type(), result = out_dtype.value_or(dtype);
  check(is_float(result), "out_dtype must be float64, float32, bfloat16 or float16");
  const Tensor w = dense(weight), gains = packed(g);
  const Tensor out = allocate(to_dims(w.sizes()), to_dims(w.strides()), result);
  const Tensor norms = allocate({weight.size(dim)}, {1}, opmath(dtype));
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    dispatch(result, [&](auto o) {
      using O = decltype(o);
      const T* from = static_cast<const T*>(w.data_ptr());
      O* to = static_cast<O*>(out.data_ptr());
      C* norm = static_cast<C*>(norms.data_ptr());
      const C* gain = static_cast<const C*>(gains.data_ptr());
      std::vector<C> s(norms.numel());
      by_row(
          Layout(w, dim), from, from,
          [&](int64_t i, double squares) {
            norm[i] = squares == 0 ? C(1) : static_cast<C>(std::sqrt(squares));
            s[i] = gain[i] / norm[i];
          },
          [&](int64_t first, int64_t n, int64_t i) { scale(from + first, to + first, n, s[i]); },
          [&](int64_t first) { scale(from + first, to + first, static_cast<int64_t>(s.size()), s.data()); });
      if (w.numel() == 0) std::fill(norm, norm + norms.numel(), C(1));
    });
  });
  return {out, norms};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor weight, Tensor g, Tensor norms, int64_t dim) {
  check_inputs(weight, g, dim);
  check(dout.is_cpu() && to_dims(dout.sizes()) == to_dims(weight.sizes()), "dout must have the shape of weight");
  check(norms.scalar_type() == g.scalar_type() && norms.numel() == g.numel(),
        "norms must be what the forward returned");
  const ScalarType dtype = weight.scalar_type(), incoming = dout.scalar_type();
  const bool half_into_float =
      dtype == ScalarType::Float && (incoming == ScalarType::BFloat16 || incoming == ScalarType::Half);
  const Tensor w = dense(weight), gains = packed(g), lengths = packed(norms);
  const Tensor d = with_strides(dout, to_dims(w.strides()), half_into_float ? incoming : dtype);
  const Tensor dweight = allocate(to_dims(w.sizes()), to_dims(w.strides()), dtype);
  const Tensor dg = allocate({g.numel()}, {1}, g.scalar_type());
  const auto run = [&](auto e, auto t) {
    using D = decltype(e);
    using T = decltype(t);
    using C = Compute<T>;
    const D* from = static_cast<const D*>(d.data_ptr());
    const T* raw = static_cast<const T*>(w.data_ptr());
    T* to = static_cast<T*>(dweight.data_ptr());
    const C *gain = static_cast<const C*>(gains.data_ptr()), *norm = static_cast<const C*>(lengths.data_ptr());
    C* dgain = static_cast<C*>(dg.data_ptr());
    std::vector<C> p(g.numel()), q(g.numel());
    by_row(
        Layout(w, dim), from, raw,
        [&](int64_t i, double along) {
          dgain[i] = static_cast<C>(along / static_cast<double>(norm[i]));
          p[i] = gain[i] / norm[i];
          q[i] = -p[i] * dgain[i] / norm[i];
        },
        [&](int64_t first, int64_t n, int64_t i) { combine(from + first, raw + first, to + first, n, p[i], q[i]); },
        [&](int64_t first) {
          combine(from + first, raw + first, to + first, static_cast<int64_t>(p.size()), p.data(), q.data());
        });
    if (w.numel() == 0) std::fill(dgain, dgain + dg.numel(), C(0));
  };
  if (!half_into_float)
    dispatch(dtype, [&](auto t) { run(t, t); });
  else if (incoming == ScalarType::BFloat16)
    run(bf16{}, float{});
  else
    run(fp16{}, float{});
  return {dweight, dg};
}

}  // namespace
}  // namespace wx::wn

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("weight_norm_fwd", TORCH_BOX(&wx::wn::forward));
  m.impl("weight_norm_bwd", TORCH_BOX(&wx::wn::backward));
}
