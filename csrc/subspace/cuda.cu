// Projections on CUDA: from tensors to kernels.cuh. Everything is checked before anything is allocated.
#include "../common/cuda_shims.h"
#include "../common/cuda_tensors.h"
#include "kernels.cuh"

#include <string>

namespace wx::gpu::sub {
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "subspace: ", what); }

int bits_of(int64_t n) { return 63 - __builtin_clzll(static_cast<unsigned long long>(n)); }

bool begins(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

// The plan: tables that lie on the CPU, and what they say of all members.
struct Plan {
  Integers members, firsts;
  Tensor layout, factors;
  std::optional<Tensor> step, c;
  std::string kind;
  int64_t dim, batch, tile, strata;
  bool packed;

  bool tiled() const { return begins(kind, "one_hot") || kind == "sparse" || kind == "block_hadamard"; }
  bool entries() const { return kind == "rademacher" || kind == "gaussian"; }
  const int64_t* row(int64_t member) const { return static_cast<const int64_t*>(layout.data_ptr()) + 4 * member; }
  const int64_t* step_ptr() const { return step ? static_cast<const int64_t*>(step->data_ptr()) : nullptr; }
  template <class C>
  const C* c_ptr() const {
    return c ? static_cast<const C*>(c->data_ptr()) : nullptr;
  }

  Fastfood fastfood() const {
    int64_t total = 0;
    for (int64_t i = 0; i < layout.size(0); i++) total += row(i)[0];
    check(total <= int64_t{1} << 30, "fastfood takes at most 2^30 elements");
    check(dim <= total, "dim must be at most the elements of the tensors");
    const auto power = [](int64_t n) { return n > 1 ? bits_of(n - 1) + 1 : 0; };
    Fastfood f{};
    f.step = step_ptr();
    f.key = {static_cast<uint32_t>(row(0)[2]), static_cast<uint32_t>(row(0)[3])};
    f.dim = dim;
    f.n_bits = power(dim);
    f.stacked = begins(kind, "fastfood_stacked");
    f.coins = kind.size() > 8 && kind.substr(kind.size() - 8) == "binomial";
    f.length_bits = f.stacked ? f.n_bits : power(total);
    f.rows = ceil_div(total, int64_t{1} << f.length_bits);
    return f;
  }
  Common common() const {
    Common o{};
    o.step = step_ptr();
    o.dim = dim;
    o.bits = bits_of(tile);
    o.strata = static_cast<int>(strata);
    o.batch = static_cast<int>(std::max<int64_t>(batch, 1));
    o.packed = packed;
    o.permuted = kind != "block_hadamard";
    o.with_signs = kind != "one_hot_unsigned";
    return o;
  }

  // One local tensor as kernels see it; `count` elements.
  template <class T>
  Part<T> part(size_t i, const void* from, void* to, int64_t count, bool same) const {
    const int64_t* r = row(members[i]);
    Part<T> p{};
    p.from = static_cast<const T*>(from);
    p.to = static_cast<T*>(to);
    p.count = count;
    p.begin = firsts[i];
    p.n = r[0];
    p.start = r[1];
    p.key = {static_cast<uint32_t>(r[2]), static_cast<uint32_t>(r[3])};
    p.factor = static_cast<Compute<T>>(static_cast<const double*>(factors.data_ptr())[members[i]]);
    p.same = same;
    return p;
  }
};

void check_tensors(const Tensors& tensors) {
  for (const Tensor& t : tensors) {
    check(on_device(t), "tensors must be CUDA tensors");
    check(is_float(t.scalar_type()), "tensors must be float64, float32, bfloat16 or float16");
    check(t.scalar_type() == tensors[0].scalar_type() && t.get_device_index() == tensors[0].get_device_index(),
          "tensors must have one dtype and one device");
  }
}

void check_vector(const Tensor& t, const Tensor& like, const char* what) {
  check(on_device(t) && t.get_device_index() == like.get_device_index() &&
            t.scalar_type() == opmath(like.scalar_type()) && t.is_contiguous(),
        what);
}

void check_plan(const Plan& p, const Tensors& tensors) {
  check(p.layout.is_cpu() && p.layout.scalar_type() == ScalarType::Long && p.layout.dim() == 2 &&
            p.layout.size(1) == 4 && p.layout.is_contiguous(),
        "layout must be a contiguous int64 tensor [tensors, 4] on the CPU");
  check(p.factors.is_cpu() && p.factors.scalar_type() == ScalarType::Double && p.factors.is_contiguous() &&
            p.factors.numel() == p.layout.size(0),
        "factors must be a contiguous float64 tensor [tensors] on the CPU");
  check(p.members.size() == tensors.size() && p.firsts.size() == tensors.size(),
        "members and firsts must be as many as the tensors");
  check(p.dim >= 1 && p.dim < int64_t{1} << 31, "dim must be from 1 to 2^31 - 1");
  check(p.batch >= 0 && p.batch < 65536, "the batch must be less than 65536");
  if (p.tiled()) {
    check(p.tile >= 64 && p.tile <= 1 << kMaxBits && (p.tile & (p.tile - 1)) == 0,
          "tile must be a power of two from 64 to 16384");
    check(p.strata >= 1 && p.strata <= p.dim, "strata must be from 1 to dim");
    check(p.strata == 1 || p.kind == "sparse", "only sparse has strata");
  }
  check(p.tiled() || p.entries() || p.kind == "fastfood_global_sign" || p.kind == "fastfood_global_binomial" ||
            p.kind == "fastfood_stacked_sign" || p.kind == "fastfood_stacked_binomial",
        "unknown kind");
  check(p.tiled() || !p.c, "c must be None for a kind without column counts");
  if (p.step) {
    check(on_device(*p.step) && p.step->numel() == 1 && p.step->scalar_type() == ScalarType::Long,
          "step must be an int64 scalar on the device of the tensors");
  }
  const int64_t lead = std::max<int64_t>(p.batch, 1);
  for (size_t i = 0; i < tensors.size(); i++) {
    check(p.members[i] >= 0 && p.members[i] < p.layout.size(0), "a member is not a row of layout");
    check(p.firsts[i] >= 0 && p.firsts[i] + tensors[i].numel() / lead <= p.row(p.members[i])[0],
          "first and the elements of a tensor must lie within the whole tensor");
  }
}

// All elements are one number in memory.
bool is_same(const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); i++)
    if (t.size(i) != 1 && t.stride(i) != 0) return false;
  return t.numel() > 1;
}

// What kernels read: where it lies, or a contiguous copy; and what they write, delivered afterwards.
struct Source {
  Tensor tensor;
  bool same;
  explicit Source(const Tensor& t) : tensor(t), same(is_same(t)) {
    if (!same) tensor = wx::gpu::packed(t);
  }
};

struct Target {
  Tensor result, target;
  Target(const Tensor& theta0, int64_t batch) : result(theta0) {
    if (batch) {
      Integers sizes = sizes_of(theta0);
      sizes.insert(sizes.begin(), batch);
      target = result = empty(theta0, sizes, theta0.scalar_type());
    } else {
      target = result = empty_like(theta0, theta0.scalar_type());
      if (!result.is_contiguous()) target = empty(theta0, sizes_of(theta0), theta0.scalar_type());
    }
  }
  void deliver() {
    if (target.data_ptr() != result.data_ptr()) torch::stable::copy_(result, target);
  }
};

template <class C>
constexpr ScalarType dtype_of = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

template <class C>
C* data_of(const Tensor& t) {
  return static_cast<C*>(t.data_ptr());
}

void check_room(const Plan& p, int itemsize) {
  check(Places::count(bits_of(p.tile)) * itemsize + kStaticBytes <= max_shared_bytes(),
        "this tile does not fit into the shared memory of this device; take a smaller one");
}

Tensors forward(Tensor z, std::optional<Tensor> c, Tensors theta0, Integers members, Integers firsts, Tensor layout,
                Tensor factors, std::optional<Tensor> step, std::string kind, int64_t tile, int64_t strata,
                bool packed) {
  if (theta0.empty()) return {};
  check_tensors(theta0);
  check(z.dim() == 1 || (z.dim() == 2 && z.size(0) >= 1), "z must be [d] or [K, d]");
  z = wx::gpu::packed(z);
  const Plan p{members, firsts, layout, factors, step, c, kind, z.size(z.dim() - 1), z.dim() == 2 ? z.size(0) : 0,
               tile,    strata, packed};
  Plan whole = p;
  whole.batch = 0;  // theta0 has no batch axis
  check_plan(whole, theta0);
  check_vector(z, theta0[0], "z must be on the device of the tensors, float64 for float64 else float32");
  if (c) check_vector(*c, theta0[0], "c must be [d], contiguous, and like z");
  if (c) check(c->numel() == p.dim, "c must be [d]");
  const OnDeviceOf device(z);
  std::vector<Source> sources;
  std::vector<Target> targets;
  for (const Tensor& t : theta0) {
    sources.emplace_back(t);
    targets.emplace_back(t, p.batch);
  }
  dispatch(theta0[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Part<T>> parts;
    for (size_t i = 0; i < theta0.size(); i++)
      if (const int64_t n = theta0[i].numel())
        parts.push_back(p.part<T>(i, sources[i].tensor.data_ptr(), targets[i].target.data_ptr(), n, sources[i].same));
    if (parts.empty()) return;
    if (p.tiled()) {
      check_room(p, sizeof(C));
      const Common o = p.common();
      const Tensor zx = empty(z, {o.batch * o.unrolled()}, dtype_of<C>);
      launch_theta(parts, o, data_of<C>(z), p.c_ptr<C>(), data_of<C>(zx), device.stream());
    } else if (p.entries()) {
      launch_entries(parts, p.common(), p.kind == "gaussian", data_of<C>(z), device.stream());
    } else {
      const Fastfood f = p.fastfood();
      const Tensor u = empty(z, {f.vectors() << f.n_bits}, dtype_of<C>), y = empty(z, {f.count()}, dtype_of<C>);
      launch_fastfood(parts, p.common(), f, data_of<C>(z), data_of<C>(u), data_of<C>(y), device.stream());
    }
    check_launches();
  });
  Tensors outs;
  for (Target& target : targets) {
    target.deliver();
    outs.push_back(target.result);
  }
  return outs;
}

// z_bar from the sums of type S that launch(data) leaves in its scratch memory; without data it says how many.
template <class S, class C, class F>
void add_up(const Common& o, const Tensor& z_bar, const C* c, const OnDeviceOf& device, const F& launch) {
  Sums<S> sums = launch(static_cast<S*>(nullptr));
  const Tensor scratch = empty(z_bar, {o.batch * sums.stored * sums.total_groups * sums.ranges}, dtype_of<S>);
  sums = launch(data_of<S>(scratch));
  launch_add_groups(sums, o, c, data_of<C>(z_bar), device.stream());
}

Tensor backward(Tensors grads, std::optional<Tensor> c, Integers members, Integers firsts, Tensor layout,
                Tensor factors, std::optional<Tensor> step, std::string kind, int64_t dim, int64_t batch, int64_t tile,
                int64_t strata, bool packed) {
  check(!grads.empty(), "there must be a gradient");
  check_tensors(grads);
  const Plan p{members, firsts, layout, factors, step, c, kind, dim, batch, tile, strata, packed};
  check_plan(p, grads);
  if (c) check_vector(*c, grads[0], "c must be [d], contiguous, float64 for float64 else float32");
  if (c) check(c->numel() == p.dim, "c must be [d]");
  const OnDeviceOf device(grads[0]);
  const int64_t rows = std::max<int64_t>(batch, 1);
  Tensor z_bar = empty(grads[0], batch ? Integers{batch, dim} : Integers{dim}, opmath(grads[0].scalar_type()));
  std::vector<Source> sources;
  for (const Tensor& g : grads) sources.emplace_back(g);
  dispatch(grads[0].scalar_type(), [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Part<T>> parts;
    for (size_t i = 0; i < grads.size(); i++)
      if (const int64_t n = grads[i].numel() / rows)
        parts.push_back(p.part<T>(i, sources[i].tensor.data_ptr(), nullptr, n, sources[i].same));
    if (parts.empty()) {
      torch::stable::zero_(z_bar);
      return;
    }
    const Common o = p.common();
    const C* scales = p.c_ptr<C>();
    if (p.tiled()) {
      check_room(p, sizeof(C));
      add_up<C>(o, z_bar, scales, device, [&](C* data) { return launch_tile_sums(parts, o, data, device.stream()); });
    } else if (p.entries()) {
      add_up<C>(o, z_bar, scales, device,
                [&](C* data) { return launch_entry_sums(parts, o, kind == "gaussian", data, device.stream()); });
    } else {
      const Fastfood f = p.fastfood();
      const Tensor whole = empty(z_bar, {f.count()}, dtype_of<C>);
      const Tensor rows_of = empty(z_bar, {f.parts() << f.n_bits}, ScalarType::Double);
      add_up<double>(o, z_bar, scales, device, [&](double* data) {
        return launch_fastfood_sums(parts, o, f, data_of<C>(whole), data_of<double>(rows_of), data, device.stream());
      });
    }
    check_launches();
  });
  return z_bar;
}

struct Dense {
  Tensor basis;
  DenseCommon common;

  Dense(const Tensor& e, const Tensors& tensors, const Integers& rows, int64_t batch) : basis(e), common{} {
    check(on_device(e) && e.dim() == 2 && e.is_contiguous() && is_float(e.scalar_type()) &&
              e.get_device_index() == tensors[0].get_device_index(),
          "basis must be a contiguous floating point tensor [D, d] on the device of the tensors");
    check(rows.size() == tensors.size(), "rows must be as many as the tensors");
    check(batch >= 0 && batch < 65536, "the batch must be less than 65536");
    for (size_t i = 0; i < rows.size(); i++)
      check(rows[i] >= 0 && rows[i] + tensors[i].numel() / std::max<int64_t>(batch, 1) <= e.size(0),
            "a tensor has elements beyond the rows of basis");
    common.basis = e.data_ptr();
    common.dim = e.size(1);
    common.batch = static_cast<int>(std::max<int64_t>(batch, 1));
  }
  void see_width(const void* z) {
    const int64_t bytes = common.dim * static_cast<int64_t>(itemsize_of(basis.scalar_type()));
    common.wide = bytes % 16 == 0 && aligned(common.basis) && (!z || aligned(z));
  }
  // f(E{}, C{})
  template <class F>
  void run(ScalarType compute, const F& f) const {
    dispatch(basis.scalar_type(), [&](auto e) {
      if (compute == ScalarType::Double) return f(e, double{});
      f(e, float{});
    });
  }

 private:
  static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
  static int itemsize_of(ScalarType t) { return t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2; }
};

Tensors dense_forward(Tensor z, Tensor basis, Tensors theta0, Integers rows) {
  if (theta0.empty()) return {};
  check_tensors(theta0);
  check(z.dim() == 1 || (z.dim() == 2 && z.size(0) >= 1), "z must be [d] or [K, d]");
  const int64_t batch = z.dim() == 2 ? z.size(0) : 0;
  Dense d(basis, theta0, rows, 0);
  check(z.size(z.dim() - 1) == d.common.dim, "z must have as many coordinates as basis has columns");
  z = wx::gpu::packed(z);
  check_vector(z, theta0[0], "z must be on the device of the tensors, float64 for float64 else float32");
  const OnDeviceOf device(z);
  d.common.batch = static_cast<int>(std::max<int64_t>(batch, 1));
  d.see_width(z.data_ptr());
  std::vector<Source> sources;
  std::vector<Target> targets;
  std::vector<DensePart> parts;
  for (size_t i = 0; i < theta0.size(); i++) {
    const Source& from = sources.emplace_back(theta0[i]);
    const Target& to = targets.emplace_back(theta0[i], batch);
    const Format format = format_of(theta0[i].scalar_type());
    if (const int64_t n = theta0[i].numel())
      parts.push_back({from.tensor.data_ptr(), to.target.data_ptr(), n, rows[i], format, from.same, 0});
  }
  if (!parts.empty())
    d.run(z.scalar_type(), [&](auto e, auto c) {
      launch_dense<decltype(e)>(parts, d.common, data_of<decltype(c)>(z), device.stream());
    });
  check_launches();
  Tensors outs;
  for (Target& target : targets) {
    target.deliver();
    outs.push_back(target.result);
  }
  return outs;
}

Tensor dense_backward(Tensors grads, Tensor basis, Integers rows, int64_t batch) {
  check(!grads.empty(), "there must be a gradient");
  check_tensors(grads);
  Dense d(basis, grads, rows, batch);
  d.see_width(nullptr);
  const OnDeviceOf device(grads[0]);
  const int64_t dim = d.common.dim, lead = std::max<int64_t>(batch, 1);
  Tensor z_bar = empty(grads[0], batch ? Integers{batch, dim} : Integers{dim}, opmath(grads[0].scalar_type()));
  std::vector<Source> sources;
  std::vector<DensePart> parts;
  for (size_t i = 0; i < grads.size(); i++) {
    const Source& from = sources.emplace_back(grads[i]);
    const Format format = format_of(grads[i].scalar_type());
    if (const int64_t n = grads[i].numel() / lead)
      parts.push_back({from.tensor.data_ptr(), nullptr, n, rows[i], format, from.same, 0});
  }
  if (parts.empty()) {
    torch::stable::zero_(z_bar);
    return z_bar;
  }
  d.run(z_bar.scalar_type(), [&](auto e, auto c) {
    using E = decltype(e);
    using C = decltype(c);
    Common o{};
    o.dim = dim;
    o.batch = d.common.batch;
    o.strata = 1;
    add_up<C, C>(o, z_bar, nullptr, device,
                 [&](C* data) { return launch_dense_sums<E>(parts, d.common, data, device.stream()); });
  });
  check_launches();
  return z_bar;
}

}  // namespace
}  // namespace wx::gpu::sub

WX_CUDA_LIBRARY(m) {
  m.impl("subspace_fwd", TORCH_BOX(&wx::gpu::sub::forward));
  m.impl("subspace_bwd", TORCH_BOX(&wx::gpu::sub::backward));
  m.impl("subspace_dense_fwd", TORCH_BOX(&wx::gpu::sub::dense_forward));
  m.impl("subspace_dense_bwd", TORCH_BOX(&wx::gpu::sub::dense_backward));
}
