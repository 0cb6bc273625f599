// theta0 + E z and E' g with a stored E [D, d]: E is read once, four rows at a time, and widened in registers.
#include "outputs.h"
#include "simd.h"

namespace wx::sub {
namespace {

constexpr int kRows = 4;

template <class C, class E>
WX_INLINE C entry(E e) {
  return static_cast<C>(widen(e));
}

// How far ahead in E to ask, in entries: in the row itself, or in the next four where rows are short.
template <class E>
WX_INLINE int64_t distance(int64_t d) {
  constexpr int64_t kNear = 1024 / sizeof(E);
  return d >= 2 * kNear ? kNear : kRows * d;
}

// out_i = <rows_i, z>, i < count; 16 sums for each (8 in float64), whatever the width of vectors.
template <class C, class E>
struct Products {
  template <int Bytes>
  WX_INLINE static void body(const E* rows, int64_t count, const C* z, int64_t d, C* out) {
    using P = Packs<C, Bytes>;
    constexpr int kParts = 64 / Bytes, kStep = kParts * P::N;
    for (int64_t first = 0; first < count; first += kRows) {
      const E* row[kRows];
      for (int i = 0; i < kRows; i++) row[i] = rows + std::min(first + i, count - 1) * d;
      typename P::F sum[kRows][kParts] = {}, x, e;
      int64_t j = 0;
      for (; j + kStep <= d; j += kStep) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; part++) {
          get(x, z + j + part * P::N);
#pragma GCC unroll 4
          for (int i = 0; i < kRows; i++) {
            if (part == 0) __builtin_prefetch(row[i] + j + distance<E>(d), 0, 3);
            get_as<C, Bytes>(e, row[i] + j + part * P::N);
            sum[i][part] = sum[i][part] + e * x;
          }
        }
      }
      for (int i = 0; i < kRows && first + i < count; i++) {
        alignas(64) C lanes[kStep];
        for (int part = 0; part < kParts; part++) put(lanes + part * P::N, sum[i][part]);
        for (int h = kStep / 2; h > 0; h /= 2)
          for (int l = 0; l < h; l++) lanes[l] += lanes[l + h];
        for (int64_t k = j; k < d; k++) lanes[0] += entry<C>(row[i][k]) * z[k];
        out[first + i] = lanes[0];
      }
    }
  }
};

// acc += sum_i g_i rows_i, i < count, four rows at a time.
template <class C, class E>
struct AddRows {
  template <int Bytes>
  WX_INLINE static void body(const E* rows, int64_t count, const C* g, int64_t d, C* acc) {
    using P = Packs<C, Bytes>;
    int64_t first = 0;
    for (; first + kRows <= count; first += kRows) {
      const E* row = rows + first * d;
      const C* s = g + first;
      int64_t j = 0;
      for (; j + P::N <= d; j += P::N) {
        typename P::F e[kRows], sum;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; i++) {
          __builtin_prefetch(row + i * d + j + distance<E>(d), 0, 3);
          get_as<C, Bytes>(e[i], row + i * d + j);
        }
        get(sum, acc + j);
        sum = sum + ((e[0] * s[0] + e[1] * s[1]) + (e[2] * s[2] + e[3] * s[3]));
        put(acc + j, sum);
      }
      for (; j < d; j++)
        acc[j] += (s[0] * entry<C>(row[j]) + s[1] * entry<C>(row[d + j])) +
                  (s[2] * entry<C>(row[2 * d + j]) + s[3] * entry<C>(row[3 * d + j]));
    }
    for (; first < count; first++)
      for (int64_t j = 0; j < d; j++) acc[j] += g[first] * entry<C>(rows[first * d + j]);
  }
};

// A tensor and its rows of E.
struct Part {
  int64_t row, count;
  Tensor held;
  const void* in;
  bool constant;
  void* out;
};

struct Dense {
  std::vector<Part> parts;
  int64_t d, batch;
  const void* basis;
  std::vector<int64_t> ends;  // pieces of kPiece rows, counted over the parts

  static constexpr int64_t kPiece = 64;

  Dense(const std::vector<Tensor>& tensors, const Tensor& basis_in, const std::vector<int64_t>& rows, int64_t batch_in,
        int64_t per_row)
      : d(basis_in.size(1)), batch(batch_in), basis(basis_in.data_ptr()) {
    for (size_t i = 0; i < tensors.size(); i++) {
      const bool constant = same_everywhere(tensors[i]);
      Tensor held = constant ? tensors[i] : packed(tensors[i]);
      parts.push_back({rows[i], tensors[i].numel() / per_row, held, held.data_ptr(), constant, nullptr});
      ends.push_back(pieces() + (parts.back().count + kPiece - 1) / kPiece);
    }
  }
  int64_t pieces() const { return ends.empty() ? 0 : ends.back(); }

  // f(part, first row of the piece within it, rows).
  template <class F>
  void piece(int64_t k, const F& f) const {
    const auto i = std::upper_bound(ends.begin(), ends.end(), k) - ends.begin();
    const int64_t first = (k - (i ? ends[i - 1] : 0)) * kPiece;
    f(parts[i], first, std::min(kPiece, parts[i].count - first));
  }
};

template <class T, class E>
void multiply(const Dense& call, const Compute<T>* z) {
  using C = Compute<T>;
  ranges(call.pieces(), std::max<int64_t>(1, (32 << 10) / (Dense::kPiece * call.d)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      call.piece(p, [&](const Part& part, int64_t first, int64_t count) {
        const E* rows = static_cast<const E*>(call.basis) + (part.row + first) * call.d;
        const T* in = static_cast<const T*>(part.in);
        for (int64_t k = 0; k < call.batch; k++) {
          C y[Dense::kPiece];
          run<Products<C, E>>(rows, count, z + k * call.d, call.d, +y);
          T* out = static_cast<T*>(part.out) + k * part.count + first;
          for (int64_t i = 0; i < count; i++)
            narrow(static_cast<C>(widen(in[part.constant ? 0 : first + i])) + y[i], out[i]);
        }
      });
  });
}

// Groups of pieces add up in dt, and in float64 to sums [groups][batch d].
template <class T, class E>
void accumulate(const Dense& call, int64_t groups, double* sums) {
  using C = Compute<T>;
  const int64_t n = call.batch * call.d;
  ranges(groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<C> acc;
    for (int64_t group = begin; group < end; group++) {
      acc.assign(n, C(0));
      for (int64_t p = group * call.pieces() / groups; p < (group + 1) * call.pieces() / groups; p++)
        call.piece(p, [&](const Part& part, int64_t first, int64_t count) {
          const E* rows = static_cast<const E*>(call.basis) + (part.row + first) * call.d;
          const T* in = static_cast<const T*>(part.in);
          for (int64_t k = 0; k < call.batch; k++) {
            C g[Dense::kPiece];
            for (int64_t i = 0; i < count; i++)
              g[i] = static_cast<C>(widen(in[part.constant ? 0 : k * part.count + first + i]));
            run<AddRows<C, E>>(rows, count, static_cast<const C*>(g), call.d, acc.data() + k * call.d);
          }
        });
      for (int64_t k = 0; k < n; k++) sums[group * n + k] = static_cast<double>(acc[k]);
    }
  });
}

void check_dense(const std::vector<Tensor>& tensors, const Tensor& basis, const std::vector<int64_t>& rows,
                 int64_t per_row) {
  check(
      basis.is_cpu() && is_float(basis.scalar_type()) && basis.dim() == 2 && basis.is_contiguous() && basis.size(1) > 0,
      "basis must be a contiguous floating-point CPU matrix [D, d]");
  check(rows.size() == tensors.size(), "rows must have an entry for each tensor");
  for (size_t i = 0; i < tensors.size(); i++) {
    check(tensors[i].is_cpu() && is_float(tensors[i].scalar_type()) &&
              tensors[i].scalar_type() == tensors[0].scalar_type(),
          "tensors must be on the CPU, floating-point and of one dtype");
    check(0 <= rows[i] && rows[i] + tensors[i].numel() / per_row <= basis.size(0),
          "a tensor reaches beyond the rows of basis");
  }
}

std::vector<Tensor> forward(Tensor z, Tensor basis, std::vector<Tensor> theta0, std::vector<int64_t> rows) {
  check_dense(theta0, basis, rows, 1);
  check_z(z, theta0);
  check(z.size(-1) == basis.size(1), "z must have a number for each column of basis");
  Outputs outs(theta0, z);
  if (theta0.empty()) return outs.final;
  Dense call(theta0, basis, rows, z.dim() == 2 ? z.size(0) : 1, 1);
  for (size_t i = 0; i < theta0.size(); i++) call.parts[i].out = outs.written[i].data_ptr();
  const Tensor coordinates = packed(z);
  dispatch(theta0[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    dispatch(basis.scalar_type(),
             [&](auto e) { multiply<T, decltype(e)>(call, static_cast<const Compute<T>*>(coordinates.data_ptr())); });
  });
  outs.settle();
  return outs.final;
}

Tensor backward(std::vector<Tensor> grads, Tensor basis, std::vector<int64_t> rows, int64_t batch) {
  check(!grads.empty(), "at least one gradient is needed");
  check(batch >= 0, "batch must not be negative");
  for (const Tensor& g : grads)
    check(batch == 0 || (g.dim() > 0 && g.size(0) == batch), "the first axis of a gradient must be the batch");
  const int64_t k = std::max<int64_t>(batch, 1), d = basis.size(1);
  check_dense(grads, basis, rows, k);
  const Dense call(grads, basis, rows, k, k);
  const ScalarType dtype = grads[0].scalar_type();
  const Tensor z_bar = allocate(batch ? Dims{batch, d} : Dims{d}, batch ? Dims{d, 1} : Dims{1}, opmath(dtype));
  const int64_t count = std::clamp<int64_t>(call.pieces() / 8, 1, 64);
  std::vector<double> sums(count * k * d);
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    dispatch(basis.scalar_type(), [&](auto e) { accumulate<T, decltype(e)>(call, count, sums.data()); });
    finish_groups<Compute<T>>(sums.data(), count, k, d, nullptr, static_cast<Compute<T>*>(z_bar.data_ptr()));
  });
  return z_bar;
}

}  // namespace
}  // namespace wx::sub

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("subspace_dense_fwd", TORCH_BOX(&wx::sub::forward));
  m.impl("subspace_dense_bwd", TORCH_BOX(&wx::sub::backward));
}
