// The subspace ops on the CPU: checks, outputs, and which kernel; reference.py has the maths.
#include <optional>
#include <string>

#include "../common/layout.h"
#include "kinds.h"
#include "outputs.h"

namespace wx::sub {
namespace {

void set_kind(Call& call, const std::string& kind) {
  static const std::pair<const char*, Kind> known[] = {
      {"one_hot", Kind::one_hot},       {"one_hot_unsigned", Kind::one_hot_unsigned},
      {"sparse", Kind::sparse},         {"block_hadamard", Kind::block_hadamard},
      {"rademacher", Kind::rademacher}, {"gaussian", Kind::gaussian},
  };
  for (const auto& [name, value] : known)
    if (kind == name) {
      call.kind = value;
      return;
    }
  call.kind = Kind::fastfood;
  call.global = kind.rfind("fastfood_global_", 0) == 0;
  const std::string diagonal = kind.substr(kind.rfind('_') + 1);
  call.binomial = diagonal == "binomial";
  STD_TORCH_CHECK((call.global || kind.rfind("fastfood_stacked_", 0) == 0) && (call.binomial || diagonal == "sign"),
                  "subspace: unknown kind ", kind.c_str());
}

// What all four tables say, and the members with their rows of them; `in` and `out` are set by the caller.
Call make_call(const std::vector<Tensor>& tensors, const std::optional<Tensor>& c, const std::vector<int64_t>& members,
               const std::vector<int64_t>& firsts, const Tensor& layout, const Tensor& factors,
               const std::optional<Tensor>& step, const std::string& kind, int64_t d, int64_t batch, int64_t tile,
               int64_t strata, bool packed_windows) {
  Call call;
  set_kind(call, kind);
  call.d = d, call.tile = tile, call.strata = strata, call.packed = packed_windows;
  check(d >= 1 && d < (int64_t{1} << 31), "the dimension must be from 1 to 2^31 - 1");
  check(batch >= 0, "batch must not be negative");
  call.batch = std::max<int64_t>(batch, 1);
  if (call.kind <= Kind::block_hadamard) {
    check(64 <= tile && tile <= 16384 && (tile & (tile - 1)) == 0, "tile must be a power of two from 64 to 16384");
    check(1 <= strata && strata <= d, "strata must be from 1 to the dimension");
    check(strata == 1 || call.kind == Kind::sparse, "only sparse has more than one stratum");
  }
  check(layout.is_cpu() && layout.scalar_type() == ScalarType::Long && layout.dim() == 2 && layout.size(1) == 4 &&
            layout.is_contiguous(),
        "layout must be a contiguous int64 CPU tensor [tensors, 4]");
  check(factors.is_cpu() && factors.scalar_type() == ScalarType::Double && factors.is_contiguous() &&
            factors.dim() == 1 && factors.size(0) == layout.size(0),
        "factors must be a contiguous float64 CPU tensor, a number for each row of layout");
  if (step) {
    check(step->is_cpu() && step->scalar_type() == ScalarType::Long && step->numel() == 1,
          "step must be an int64 scalar on the CPU");
    const int64_t value = *static_cast<const int64_t*>(step->data_ptr());
    check(0 <= value && value < (int64_t{1} << 32), "step must be from 0 to 2^32 - 1");
    call.step = static_cast<uint32_t>(value);
  }
  const int64_t* rows = static_cast<const int64_t*>(layout.data_ptr());
  const auto key = [&](int64_t row) {
    return Key{static_cast<uint32_t>(rows[4 * row + 2]), static_cast<uint32_t>(rows[4 * row + 3])};
  };
  for (int64_t row = 0; row < layout.size(0); row++) call.total += rows[4 * row];
  check(members.size() == tensors.size() && firsts.size() == tensors.size(),
        "members and firsts must have an entry for each tensor");
  if (!tensors.empty()) call.dtype = tensors[0].scalar_type(), call.key0 = key(0);
  check(is_float(call.dtype), "tensors must be float64, float32, bfloat16 or float16");
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& t = tensors[i];
    check(t.is_cpu() && t.scalar_type() == call.dtype, "tensors must be on the CPU and of one dtype");
    check(0 <= members[i] && members[i] < layout.size(0), "members must be rows of layout");
    check(batch == 0 || (t.dim() > 0 && t.size(0) == batch), "the first axis of a gradient must be the batch");
    const int64_t numel = rows[4 * members[i]], count = t.numel() / call.batch;
    check(0 <= firsts[i] && firsts[i] + count <= numel, "a tensor reaches beyond the elements that layout gives it");
    call.members.push_back({numel, rows[4 * members[i] + 1], key(members[i]),
                            static_cast<const double*>(factors.data_ptr())[members[i]], firsts[i], count, nullptr,
                            same_everywhere(t), nullptr});
  }
  if (c)
    check(c->is_cpu() && c->scalar_type() == opmath(call.dtype) && c->numel() == d,
          "c must have a number for each column, float64 for float64 tensors, else float32");
  return call;
}

std::vector<Tensor> forward(Tensor z, std::optional<Tensor> c, std::vector<Tensor> theta0, std::vector<int64_t> members,
                            std::vector<int64_t> firsts, Tensor layout, Tensor factors, std::optional<Tensor> step,
                            std::string kind, int64_t tile, int64_t strata, bool packed_windows) {
  check_z(z, theta0);
  const int64_t batch = z.dim() == 2 ? z.size(0) : 1;
  Call call =
      make_call(theta0, c, members, firsts, layout, factors, step, kind, z.size(-1), 0, tile, strata, packed_windows);
  call.batch = batch;
  const Tensor coordinates = packed(z), scales = c ? packed(*c) : z;
  call.z = coordinates.data_ptr();
  call.c = c ? scales.data_ptr() : nullptr;
  Outputs outs(theta0, z);
  call.past_cache = outs.bytes() >= kPastCache;
  std::vector<Tensor> held;
  for (size_t i = 0; i < theta0.size(); i++) {
    held.push_back(call.members[i].constant ? theta0[i] : packed(theta0[i]));
    call.members[i].in = held.back().data_ptr();
    call.members[i].out = outs.written[i].data_ptr();
  }
  if (batch > 0 && !theta0.empty()) {
    if (call.kind <= Kind::block_hadamard)
      tiled_forward(call);
    else if (call.kind == Kind::fastfood)
      fastfood_forward(call);
    else
      entrywise_forward(call);
  }
  outs.settle();
  return outs.final;
}

Tensor backward(std::vector<Tensor> grads, std::optional<Tensor> c, std::vector<int64_t> members,
                std::vector<int64_t> firsts, Tensor layout, Tensor factors, std::optional<Tensor> step,
                std::string kind, int64_t dim, int64_t batch, int64_t tile, int64_t strata, bool packed_windows) {
  check(!grads.empty(), "at least one gradient is needed");
  Call call =
      make_call(grads, c, members, firsts, layout, factors, step, kind, dim, batch, tile, strata, packed_windows);
  const Tensor scales = c ? packed(*c) : factors;
  call.c = c ? scales.data_ptr() : nullptr;
  const Tensor z_bar =
      allocate(batch ? Dims{batch, dim} : Dims{dim}, batch ? Dims{dim, 1} : Dims{1}, opmath(call.dtype));
  call.z_bar = z_bar.data_ptr();
  std::vector<Tensor> held;
  for (size_t i = 0; i < grads.size(); i++) {
    held.push_back(call.members[i].constant ? grads[i] : packed(grads[i]));
    call.members[i].in = held.back().data_ptr();
  }
  if (call.kind <= Kind::block_hadamard)
    tiled_backward(call);
  else if (call.kind == Kind::fastfood)
    fastfood_backward(call);
  else
    entrywise_backward(call);
  return z_bar;
}

}  // namespace
}  // namespace wx::sub

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("subspace_fwd", TORCH_BOX(&wx::sub::forward));
  m.impl("subspace_bwd", TORCH_BOX(&wx::sub::backward));
}
