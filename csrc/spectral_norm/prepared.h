// A group of weights that is computed again and again: lists of tensors are taken apart once, and kept.
//
// Handing 64 weights with u and v to an op, and 64 results back, costs more than computing them. A `Prepared` holds the
// tensors; a call names it by a handle, a tensor that owns it. The power iteration is written to u and v in place.
#pragma once
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "members.h"

namespace wx::sn {

inline Tensor vector(int64_t n, ScalarType dtype) { return allocate({n}, {1}, dtype); }

class Prepared {
 public:
  explicit Prepared(Members members) : m(std::move(members)) {
    live(this, 1);
    for (size_t i = 0; i < m.weights.size(); i++) {
      sizes.push_back(to_dims(m.weights[i].sizes()));
      strides.push_back(to_dims(m.weights[i].strides()));
      layouts.emplace_back(m.weights[i], m.dims[i]);
      lengths.push_back(state_size(m.weights[i], m.dims[i]));
    }
  }
  virtual ~Prepared() { live(this, -1); }

  // Whether `p` is one: a handle may be any tensor. change: 1 for a new one, -1 for one that goes.
  static bool live(const void* p, int change = 0) {
    static auto* all = new std::unordered_set<const void*>;  // handles may outlive the static destructors
    static auto* mutex = new std::mutex;
    const std::lock_guard<std::mutex> guard(*mutex);
    if (change > 0) all->insert(p);
    if (change < 0) all->erase(p);
    return all->count(p) > 0;
  }

  // The state; the results go to `results`, the new u and v to where the old are. One thread at a time.
  virtual Tensor forward(const std::vector<Tensor>& results) = 0;

  std::vector<Tensor> results() const {
    std::vector<Tensor> fresh;
    for (size_t i = 0; i < sizes.size(); i++) fresh.push_back(allocate(sizes[i], strides[i], m.result));
    return fresh;
  }

  // Weights and vectors may have moved (`.data = ...`), but must be what they were.
  bool same_weight(size_t i) const {
    const Tensor& w = m.weights[i];
    return w.is_cpu() && w.scalar_type() == m.dtype && same(w.sizes(), sizes[i]) && same(w.strides(), strides[i]);
  }

  bool unchanged() const {
    for (size_t i = 0; i < m.weights.size(); i++) {
      const int64_t h = sizes[i][m.dims[i]];
      if (!same_weight(i) || !is_vector(m.us[i], h) || !is_vector(m.vs[i], lengths[i] - h - 1)) return false;
    }
    for (const Tensor& gain : m.gains)
      if (!gain.is_cpu()) return false;
    return true;
  }

  bool is_vector(const Tensor& x, int64_t n) const {
    return x.is_cpu() && x.scalar_type() == opmath(m.dtype) && x.numel() == n && x.is_contiguous();
  }

  Members m;
  std::vector<Dims> sizes, strides;
  std::vector<Layout> layouts;
  std::vector<int64_t> lengths;  // of the states
};

template <class T, class O>
class PreparedFor : public Prepared {
 public:
  using Prepared::Prepared;

  Tensor forward(const std::vector<Tensor>& results) override {
    using C = Compute<T>;
    const std::lock_guard<std::mutex> guard(mutex_);  // of work_: Python lets other threads run meanwhile
    const Tensor state = vector(m.total, opmath(m.dtype));
    auto* numbers = static_cast<C*>(state.data_ptr());
    for (size_t i = 0; i < m.weights.size(); i++) {
      if (work_.size() == i) work_.push_back(m.forward<T, O>(i, m.weights[i], m.us[i], m.vs[i], state, &results[i]));
      Forward<T, O>& f = work_[i];
      f.w = static_cast<const T*>(m.weights[i].data_ptr());
      f.out = static_cast<O*>(results[i].data_ptr());
      f.u0 = static_cast<const C*>(m.us[i].data_ptr());
      f.v0 = static_cast<const C*>(m.vs[i].data_ptr());
      f.state = numbers + m.offsets[i];
      if (!m.gains.empty()) f.gain = scalar(m.gains[i]);
    }
    run_all(work_);
    for (size_t i = 0; i < m.weights.size(); i++) {
      if (!m.n_iters[i]) continue;
      const size_t h = m.us[i].numel(), w = m.vs[i].numel();
      std::memcpy(m.us[i].data_ptr(), numbers + m.offsets[i], h * sizeof(C));
      std::memcpy(m.vs[i].data_ptr(), numbers + m.offsets[i] + h, w * sizeof(C));
    }
    return state;
  }

 private:
  std::mutex mutex_;
  std::vector<Forward<T, O>> work_;
};

namespace {

// A handle, or an empty tensor where the group cannot be prepared: it would need copies, or torch is too old.
Tensor prepare(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs, std::vector<Tensor> gains,
               std::vector<int64_t> dims, std::vector<int64_t> n_iters, double eps, bool v_first,
               std::optional<double> bound, std::optional<ScalarType> out_dtype) {
  Members members(weights, us, vs, gains, dims, n_iters, {eps, v_first, bound}, out_dtype);
  bool fits = torch_from_blob != nullptr;
  for (size_t i = 0; i < weights.size(); i++) {
    const Dims sizes = to_dims(weights[i].sizes()), strides = to_dims(weights[i].strides());
    fits = fits && is_dense(sizes, strides) && us[i].is_contiguous() && vs[i].is_contiguous();
  }
  if (!fits) return allocate({0}, {1}, ScalarType::Float);
  std::unique_ptr<Prepared> prepared;
  dispatch(members.dtype, [&](auto t) {
    dispatch(members.result,
             [&](auto o) { prepared = std::make_unique<PreparedFor<decltype(t), decltype(o)>>(std::move(members)); });
  });
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  auto free = [](void* p, void*) { delete static_cast<Prepared*>(p); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(prepared.get(), 1, &one, &one, 0, aoti_torch_dtype_uint8(),
                                                aoti_torch_device_type_cpu(), -1, &handle, 0, nullptr, 0, free,
                                                nullptr));
  static_cast<void>(prepared.release());
  return Tensor(handle);
}

Prepared& prepared_of(const Tensor& handle) {
  check(handle.is_cpu() && handle.scalar_type() == ScalarType::Byte && Prepared::live(handle.data_ptr()),
        "prepared must be a handle that spectral_norm_prepare returned");
  return *static_cast<Prepared*>(handle.data_ptr());
}

// No results, and nothing done, where a tensor is not what it was: of another shape, layout, dtype or device.
std::tuple<std::vector<Tensor>, Tensor> prepared_forward(Tensor handle) {
  Prepared& p = prepared_of(handle);
  if (!p.unchanged()) return {std::vector<Tensor>(), allocate({0}, {1}, ScalarType::Float)};
  const std::vector<Tensor> results = p.results();
  const Tensor state = p.forward(results);
  return {results, state};
}

// The gradients of the members in `which`, in new tensors, or added to those in `into`.
std::tuple<std::vector<Tensor>, Tensor> prepared_backward(Tensor handle, std::vector<Tensor> douts,
                                                          std::vector<int64_t> which, Tensor state,
                                                          std::vector<Tensor> into) {
  const Prepared& p = prepared_of(handle);
  const Members& m = p.m;
  const ScalarType dtype = m.dtype, compute = opmath(dtype);
  check(!which.empty() && douts.size() == which.size() && (into.empty() || into.size() == which.size()),
        "douts, which and into must be equally many, at least one");
  check(state.is_cpu() && state.scalar_type() == compute && state.numel() == m.total && state.is_contiguous(),
        "state must be what the forward returned");
  int64_t out_bytes = 0;
  for (size_t k = 0; k < which.size(); k++) {
    check(0 <= which[k] && which[k] < static_cast<int64_t>(m.weights.size()), "which is out of range");
    const size_t i = which[k];
    check(p.same_weight(i), "a weight has another shape, layout, dtype or device than in the forward");
    check(douts[k].is_cpu() && same(douts[k].sizes(), p.sizes[i]), "douts must have the shapes of the weights");
    check(into.empty() || (into[k].is_cpu() && into[k].scalar_type() == dtype && same(into[k].sizes(), p.sizes[i]) &&
                           same(into[k].strides(), p.strides[i])),
          "into must have the shapes, layouts and dtype of the weights");
    out_bytes += m.weights[i].numel() * itemsize(dtype);
  }
  const ScalarType incoming = incoming_dtype(douts, dtype);
  const Tensor dgains = vector(static_cast<int64_t>(which.size()), compute);
  std::vector<Tensor> dweights, held;
  dispatch_backward(incoming, dtype, [&](auto g, auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<Backward<decltype(g), T>> work;
    for (size_t k = 0; k < which.size(); k++) {
      const size_t i = which[k];
      held.push_back(with_strides(douts[k], p.strides[i], incoming));
      if (into.empty()) dweights.push_back(allocate(p.sizes[i], p.strides[i], dtype));
      const Tensor& target = into.empty() ? dweights[k] : into[k];
      work.push_back({static_cast<const decltype(g)*>(held[k].data_ptr()),
                      static_cast<const T*>(m.weights[i].data_ptr()), static_cast<T*>(target.data_ptr()), p.layouts[i],
                      static_cast<const C*>(state.data_ptr()) + m.offsets[i],
                      m.gains.empty() ? 1.0 : scalar(m.gains[i]), m.options.bound,
                      static_cast<C*>(dgains.data_ptr()) + k, out_bytes > kPastCache, !into.empty()});
    }
    run_all(work);
  });
  return {dweights, dgains};
}

}  // namespace

}  // namespace wx::sn
