// The tiled kinds (one_hot, sparse, block_hadamard): blocks, windows of columns, and what a thread keeps between tiles.
//
// zx holds, for each stratum of columns, its values and then the first `tile` of them again, over and over: the window
// of a block is one piece of it, for any d. The backward adds into an array of the same form and folds it at the end.
#pragma once
#include <cmath>

#include "call.h"
#include "draws.h"
#include "hadamard.h"
#include "passes.h"

namespace wx::sub {

struct Stratum {
  int64_t low, width, at;  // its first column, how many, where its values begin in zx
};

inline std::vector<Stratum> strata_of(const Call& call) {
  std::vector<Stratum> strata;
  for (int64_t r = 0; r < call.strata; r++) {
    const int64_t low = r * call.d / call.strata, high = (r + 1) * call.d / call.strata;
    strata.push_back({low, high - low, low + r * call.tile});
  }
  return strata;
}

inline int64_t unrolled(const Call& call) { return call.d + call.strata * call.tile; }

// fl(z c), unrolled, for each of the batch.
template <class C>
std::vector<C> unroll(const Call& call, const std::vector<Stratum>& strata) {
  std::vector<C> zx(call.batch * unrolled(call));
  const C* c = static_cast<const C*>(call.c);
  for (int64_t k = 0; k < call.batch; k++) {
    const C* z = static_cast<const C*>(call.z) + k * call.d;
    for (const Stratum& s : strata) {
      C* to = zx.data() + k * unrolled(call) + s.at;
      for (int64_t j = 0; j < s.width; j++) to[j] = c ? z[s.low + j] * c[s.low + j] : z[s.low + j];
      for (int64_t j = 0; j < call.tile; j++) to[s.width + j] = to[j];
    }
  }
  return zx;
}

// What a thread holds while it works through tiles.
template <class T>
class Tile {
 public:
  using C = Compute<T>;

  Tile(const Call& call, const std::vector<Stratum>& strata)
      : call_(call),
        strata_(strata),
        q_(call.tile),
        moved_(call.tile),
        places_(call.tile + 32),
        none_(call.tile / 32 + 4),
        origins_(strata.size()),
        slopes_(strata.size()) {}

  // theta of piece (member, at).
  void forward(Piece piece, const C* zx) {
    enter(piece);
    each_block([&](int64_t b, int64_t length) {
      const int64_t begin = std::max(b, low_), end = std::min(b + length, high_);
      for (int64_t k = 0; k < call_.batch; k++) {
        const C* values = zx + k * unrolled(call_);
        const uint32_t* signs = none_.data();
        C factor = static_cast<C>(member_->factor);
        if (call_.kind == Kind::block_hadamard) {
          run<Flipped<C, false>>(q_.data() + b, values + origin(0, b), signs_in(0), b, b + length);
          hadamard(q_.data() + b, length);
          signs = signs_out(), factor = factor * root(length);
        } else {
          read_places(b, length, k, values, signs);
        }
        run<Finish<T>>(static_cast<const C*>(q_.data()), signs, factor, in(0, begin), out(k, begin), begin, end,
                       call_.past_cache);
      }
    });
  }

  // Adds what the gradients of a piece give to acc, [batch][unrolled].
  void backward(Piece piece, C* acc) {
    enter(piece);
    each_block([&](int64_t b, int64_t length) {
      const int64_t begin = std::max(b, low_), end = std::min(b + length, high_);
      for (int64_t k = 0; k < call_.batch; k++) {
        C* sums = acc + k * unrolled(call_);
        const bool mixed = call_.kind == Kind::block_hadamard;
        const C factor = static_cast<C>(member_->factor) * (mixed ? root(length) : C(1));
        const uint32_t* signs = mixed ? signs_out() : single() ? signs_in(0) : none_.data();
        std::fill(q_.data() + b, q_.data() + begin, C(0));
        run<Begin<T>>(q_.data(), signs, factor, in(k, begin), begin, end);
        std::fill(q_.data() + end, q_.data() + b + length, C(0));
        if (mixed) {
          hadamard(q_.data() + b, length);
          run<Flipped<C, true>>(sums + origin(0, b), static_cast<const C*>(q_.data() + b), signs_in(0), b, b + length);
        } else {
          add_places(b, length, k, sums);
        }
      }
    });
  }

 private:
  bool single() const { return call_.strata == 1 && call_.kind == Kind::one_hot; }

  // q = the sum over strata; the signs of one_hot itself are left to the last pass.
  void read_places(int64_t b, int64_t length, int64_t k, const C* values, const uint32_t*& signs) {
    for (size_t r = 0; r < strata_.size(); r++) {
      if (k == 0 || strata_.size() > 1) places(b, length, static_cast<uint32_t>(r), false);
      const C* window = values + origin(r, b);
      if (call_.kind != Kind::sparse) {
        gather(q_.data() + b, window, places_.data(), length);
        if (single()) signs = signs_in(0);
        return;
      }
      gather(moved_.data(), window, places_.data(), length);
      const C* from = moved_.data();
      if (r == 0)
        run<Flipped<C, false>>(q_.data() + b, from, signs_in(r), b, b + length);
      else
        run<Flipped<C, true>>(q_.data() + b, from, signs_in(r), b, b + length);
    }
  }

  // By the inverse permutation, so that columns are added in their order.
  void add_places(int64_t b, int64_t length, int64_t k, C* sums) {
    std::vector<C>& flipped = flipped_;
    for (size_t r = 0; r < strata_.size(); r++) {
      if (k == 0 || strata_.size() > 1) places(b, length, static_cast<uint32_t>(r), true);
      const C* from = q_.data() + b;
      if (call_.kind == Kind::sparse) {
        flipped.resize(call_.tile);
        run<Flipped<C, false>>(flipped.data(), from, signs_in(r), b, b + length);
        from = flipped.data();
      }
      gather(moved_.data(), from, places_.data(), length);
      add<C>(sums + origin(r, b), moved_.data(), length);
    }
  }

  void enter(Piece piece) {
    const Member* member = &call_.members[piece.member];
    if (member != member_) {
      member_ = member;
      for (size_t r = 0; r < strata_.size(); r++) {
        const auto width = static_cast<uint64_t>(strata_[r].width);
        const Words w = draw(member->key, kSetup, 0, static_cast<uint32_t>(r), 0);
        origins_[r] = static_cast<int64_t>(w.at[0] * width >> 32);
        slopes_[r] = strata_[r].width > call_.tile ? static_cast<int64_t>(w.at[1] * width >> 32) : 0;
      }
      in_signs_ = out_signs_ = Signs();
      if (member->constant) same_.assign(call_.tile, *static_cast<const T*>(member->in));
    }
    start_ = piece.at * call_.tile;
    valid_ = std::min(call_.tile, member->numel - start_);
    low_ = std::max<int64_t>(0, member->first - start_);
    high_ = std::min(valid_, member->first + member->count - start_);
  }

  // The blocks of the tile with an element that is here: a power of two, largest first.
  template <class F>
  void each_block(const F& f) const {
    for (int64_t b = 0, left = valid_; left > 0;) {
      int64_t length = 1;
      while (2 * length <= left) length *= 2;
      if (b < high_ && b + length > low_) f(b, length);
      b += length;
      left -= length;
    }
  }

  int64_t origin(size_t r, int64_t b) const {
    const Stratum& s = strata_[r];
    const int64_t at = start_ + b;
    const int64_t o = call_.packed ? member_->start + at : origins_[r] + at + at / s.width * slopes_[r];
    return s.at + o % s.width;
  }

  void places(int64_t b, int64_t length, uint32_t r, bool inverse) {
    const Words w = draw(member_->key, kPerm, start_ + b, r, call_.step);
    run<Places>(Permutation(w, __builtin_ctzll(length)), inverse, places_.data(), length);
  }

  static C root(int64_t length) {
    const int m = __builtin_ctzll(length);
    return static_cast<C>(std::ldexp(m & 1 ? static_cast<C>(1 / std::sqrt(2.0)) : C(1), -(m >> 1)));
  }

  const uint32_t* signs_in(size_t r) {
    return in_signs_.of(member_->key, kSignIn, static_cast<uint32_t>(r), call_.step, start_, valid_, member_->numel);
  }
  const uint32_t* signs_out() {
    return out_signs_.of(member_->key, kSignOut, 0, call_.step, start_, valid_, member_->numel);
  }

  const T* in(int64_t k, int64_t element) const {
    if (member_->constant) return same_.data();
    return static_cast<const T*>(member_->in) + k * member_->count + start_ + element - member_->first;
  }
  T* out(int64_t k, int64_t element) const {
    return static_cast<T*>(member_->out) + k * member_->count + start_ + element - member_->first;
  }

  const Call& call_;
  const std::vector<Stratum>& strata_;
  std::vector<C> q_, moved_, flipped_;
  std::vector<uint16_t> places_;
  std::vector<uint32_t> none_;             // no signs
  std::vector<int64_t> origins_, slopes_;  // o_t and delta_t of each stratum
  std::vector<T> same_;
  Signs in_signs_, out_signs_;
  const Member* member_ = nullptr;
  int64_t start_ = 0, valid_ = 0, low_ = 0, high_ = 0;  // of the tile: its start, elements, and those that are here
};

}  // namespace wx::sub
