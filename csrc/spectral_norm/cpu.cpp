// Spectral normalization on the CPU: the ops. forward.h and backward.h have the work on one weight.
//
// Work is cut into blocks whose size depends on the shape alone, and partial sums are added in the order of the blocks:
// the result does not depend on the number of threads.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "members.h"
#include "prepared.h"

namespace wx::sn {
namespace {

Tensor run_forward(const Members& m, std::vector<Tensor>* outs) {
  const Tensor state = vector(m.total, opmath(m.dtype));
  std::vector<Tensor> held;
  dispatch(m.dtype, [&](auto t) {
    dispatch(m.result, [&](auto o) {
      std::vector<Forward<decltype(t), decltype(o)>> work;
      for (size_t i = 0; i < m.weights.size(); i++) {
        const Tensor w = dense(m.weights[i]), u = packed(m.us[i]), v = packed(m.vs[i]);
        if (outs) outs->push_back(allocate(to_dims(w.sizes()), to_dims(w.strides()), m.result));
        work.push_back(m.forward<decltype(t), decltype(o)>(i, w, u, v, state, outs ? &outs->back() : nullptr));
        held.insert(held.end(), {w, u, v});
      }
      run_all(work);
    });
  });
  return state;
}

std::tuple<std::vector<Tensor>, Tensor> forward_list(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                     std::vector<Tensor> vs, std::vector<Tensor> gains,
                                                     std::vector<int64_t> dims, std::vector<int64_t> n_iters,
                                                     double eps, bool v_first, std::optional<double> bound,
                                                     std::optional<ScalarType> out_dtype) {
  std::vector<Tensor> outs;
  const Members members(weights, us, vs, gains, dims, n_iters, {eps, v_first, bound}, out_dtype);
  const Tensor state = run_forward(members, &outs);
  return {outs, state};
}

Tensor state_list(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs,
                  std::vector<int64_t> dims, std::vector<int64_t> n_iters, double eps, bool v_first) {
  return run_forward(Members(weights, us, vs, {}, dims, n_iters, {eps, v_first, std::nullopt}, std::nullopt), nullptr);
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
  int64_t out_bytes = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    check(douts[i].is_cpu() && same(douts[i].sizes(), to_dims(weights[i].sizes())),
          "douts must be on the CPU and have the shapes of the weights");
    check(offsets[i] >= 0 && offsets[i] + state_size(weights[i], dims[i]) <= state.numel(), "offset is out of range");
    out_bytes += weights[i].numel() * itemsize(dtype);
  }
  const ScalarType incoming = incoming_dtype(douts, dtype);
  const Tensor flat = packed(state);
  const Tensor dgains = vector(static_cast<int64_t>(weights.size()), compute);
  std::vector<Tensor> dweights, held;
  dispatch_backward(incoming, dtype, [&](auto g, auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Backward<decltype(g), T>> work;
    for (size_t i = 0; i < weights.size(); i++) {
      const Tensor w = dense(weights[i]), dout = with_strides(douts[i], to_dims(w.strides()), incoming);
      dweights.push_back(allocate(to_dims(w.sizes()), to_dims(w.strides()), dtype));
      work.push_back({static_cast<const decltype(g)*>(dout.data_ptr()), static_cast<const T*>(w.data_ptr()),
                      static_cast<T*>(dweights[i].data_ptr()), Layout(w, dims[i]),
                      static_cast<const C*>(flat.data_ptr()) + offsets[i], gains.empty() ? 1.0 : scalar(gains[i]),
                      bound, static_cast<C*>(dgains.data_ptr()) + i, out_bytes > kPastCache, false});
      held.insert(held.end(), {w, dout});
    }
    run_all(work);
  });
  return {dweights, dgains};
}

std::vector<Tensor> list_of(const std::optional<Tensor>& gain) {
  return gain ? std::vector<Tensor>{*gain} : std::vector<Tensor>{};
}

std::tuple<Tensor, Tensor> forward(Tensor weight, Tensor u, Tensor v, std::optional<Tensor> gain, int64_t dim,
                                   int64_t n_iter, double eps, bool v_first, std::optional<double> bound,
                                   std::optional<ScalarType> out_dtype) {
  auto [outs, state] = forward_list({weight}, {u}, {v}, list_of(gain), {dim}, {n_iter}, eps, v_first, bound, out_dtype);
  return {outs[0], state};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor weight, Tensor state, std::optional<Tensor> gain, int64_t dim,
                                    std::optional<double> bound) {
  auto [dweights, dgains] = backward_list({dout}, {weight}, state, {0}, list_of(gain), {dim}, bound);
  const Tensor dgain = allocate({}, {}, dgains.scalar_type());
  std::memcpy(dgain.data_ptr(), dgains.data_ptr(), itemsize(dgains.scalar_type()));
  return {dweights[0], dgain};
}

}  // namespace
}  // namespace wx::sn

STABLE_TORCH_LIBRARY_IMPL(weightxform, CPU, m) {
  m.impl("spectral_norm_fwd", TORCH_BOX(&wx::sn::forward));
  m.impl("spectral_norm_bwd", TORCH_BOX(&wx::sn::backward));
  m.impl("spectral_norm_fwd_list", TORCH_BOX(&wx::sn::forward_list));
  m.impl("spectral_norm_bwd_list", TORCH_BOX(&wx::sn::backward_list));
  m.impl("spectral_norm_state_list", TORCH_BOX(&wx::sn::state_list));
  m.impl("spectral_norm_prepare", TORCH_BOX(&wx::sn::prepare));
  m.impl("spectral_norm_prepared_fwd", TORCH_BOX(&wx::sn::prepared_forward));
  m.impl("spectral_norm_prepared_bwd", TORCH_BOX(&wx::sn::prepared_backward));
}
