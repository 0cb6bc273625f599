// The arguments of a call, checked, as the kernels want them. No torch type beyond dtypes: cpu.cpp makes it.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/dense.h"
#include "../common/philox.h"
#include "../common/work.h"

namespace wx::sub {

enum class Kind { one_hot, one_hot_unsigned, sparse, block_hadamard, rademacher, gaussian, fastfood };

struct Member {
  int64_t numel, start;  // of the whole tensor: its elements, its first row of P
  Key key;
  double factor;
  int64_t first, count;  // the elements that are here
  const void* in;        // theta0 [count], or the gradient [batch, count]
  bool constant;         // `in` is one number, that of every element
  void* out;             // [batch, count]
};

struct Call {
  Kind kind;
  bool global = false, binomial = false;  // of fastfood
  int64_t d = 0, tile = 0, strata = 1, batch = 1, total = 0;
  bool packed = false;
  uint32_t step = 0;
  Key key0{};  // of the first tensor of the plan: fastfood has one key
  ScalarType dtype = ScalarType::Float;
  const void *z = nullptr, *c = nullptr;  // dt: [batch, d], [d] or null
  void* z_bar = nullptr;                  // dt: [batch, d]
  std::vector<Member> members;
  bool past_cache = false;  // outputs are stored past the cache
};

// Groups of equal count in which a backward sums: of the sizes alone, not of the threads.
inline int64_t groups(int64_t total, int64_t d, int64_t least) {
  return std::clamp<int64_t>(total / std::max(8 * d, least), 1, 256);
}

// f(begin, end) for parts of 0 .. n - 1, a part to each thread.
template <class F>
void ranges(int64_t n, int64_t grain, const F& f) {
  if (n <= grain) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { f(begin, end); });
}

// z_bar = c (sum of the groups' sums, in their order), sums in float64: [groups][batch d]. c: [d], or null for ones.
template <class C>
void finish_groups(const double* sums, int64_t count, int64_t batch, int64_t d, const C* c, C* z_bar) {
  const int64_t n = batch * d;
  ranges(n, 512, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(sums + begin, sums + end);
    for (int64_t g = 1; g < count; g++)
      for (int64_t k = begin; k < end; k++) sum[k - begin] += sums[g * n + k];
    for (int64_t k = begin; k < end; k++) {
      const C value = static_cast<C>(sum[k - begin]);
      z_bar[k] = c ? value * c[k % d] : value;
    }
  });
}

template <class C>
void finish_groups(const Call& call, const double* sums, int64_t count) {
  finish_groups(sums, count, call.batch, call.d, static_cast<const C*>(call.c), static_cast<C*>(call.z_bar));
}

// Of tensors that are cut into pieces: which piece of which member is number k of a call.
struct Piece {
  int64_t member, at;  // at: of the pieces of the whole tensor
};

class Pieces {
 public:
  // `size` elements each, only those that touch what is here.
  Pieces(const std::vector<Member>& members, int64_t size) {
    for (const Member& m : members) {
      firsts_.push_back(m.first / size);
      const int64_t end = (m.first + m.count + size - 1) / size;
      ends_.push_back(count() + (m.count ? end - firsts_.back() : 0));
    }
  }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  Piece operator[](int64_t k) const {
    const auto m = std::upper_bound(ends_.begin(), ends_.end(), k) - ends_.begin();
    return {m, firsts_[m] + k - (m ? ends_[m - 1] : 0)};
  }

 private:
  std::vector<int64_t> firsts_, ends_;
};

}  // namespace wx::sub
