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

// n numbers that begin at a cache line: vectors that straddle two cost twice.
template <class C>
class Lines {
 public:
  explicit Lines(int64_t n) : held_(n + 64 / sizeof(C)) {
    const auto at = reinterpret_cast<uintptr_t>(held_.data());
    data_ = held_.data() + (64 - at % 64) % 64 / sizeof(C);
  }
  C* data() { return data_; }

 private:
  std::vector<C> held_;
  C* data_;
};

// What a thread holds while it works through tiles.
template <class T>
class Tile {
 public:
  using C = Compute<T>;

  Tile(const Call& call, const std::vector<Stratum>& strata)
      : call_(call),
        strata_(strata),
        held_(call.tile),
        held_moved_(call.tile),
        held_places_(call.tile + 32),
        q_(held_.data()),
        moved_(held_moved_.data()),
        places_(held_places_.data()),
        none_(call.tile / 32 + 4),
        origins_(strata.size()),
        slopes_(strata.size()) {}

  // theta of piece (member, at).
  void forward(Piece piece, const C* zx) {
    enter(piece);
    each_block([&](int64_t b, int64_t length) {
      for (int64_t k = 0; k < call_.batch; k++) {
        const C* values = zx + k * unrolled(call_);
        if (call_.kind == Kind::block_hadamard)
          forward_mixed(b, length, k, values);
        else if (call_.kind == Kind::sparse)
          forward_sparse(b, length, k, values);
        else
          forward_moved(b, length, k, values);
      }
    });
  }

  // Adds what the gradients of a piece give to acc, [batch][unrolled].
  void backward(Piece piece, C* acc) {
    enter(piece);
    each_block([&](int64_t b, int64_t length) {
      for (int64_t k = 0; k < call_.batch; k++) {
        C* sums = acc + k * unrolled(call_);
        if (call_.kind == Kind::block_hadamard) {
          begin(b, length, k, root(length), signs_out());
          hadamard(q_ + b, length, ahead(k, b));
          run<Flipped<C, true>>(sums + origin(0, b), constant(q_ + b), signs_in(0), b, b + length);
        } else if (call_.kind == Kind::sparse) {
          begin(b, length, k, C(1), none_.data());
          for (size_t r = 0; r < strata_.size(); r++) {
            draw_places(b, length, r, true);
            flipped_.resize(length);
            run<Flipped<C, false>>(flipped_.data(), constant(q_ + b), signs_in(r), b, b + length);
            run<Gather<C, true>>(sums + origin(r, b), constant(flipped_.data()), constant(places_), length,
                                 r ? Ahead() : ahead(k, b));
          }
        } else {
          begin(b, length, k, C(1), call_.kind == Kind::one_hot ? signs_in(0) : none_.data());
          if (k == 0) draw_places(b, length, 0, true);  // the inverse, so that columns are added in their order
          run<Gather<C, true>>(sums + origin(0, b), constant(q_ + b), constant(places_), length, ahead(k, b));
        }
      }
    });
  }

 private:
  template <class V>
  static const V* constant(V* p) {
    return p;
  }

  void forward_mixed(int64_t b, int64_t length, int64_t k, const C* values) {
    run<Flipped<C, false>>(q_ + b, values + origin(0, b), signs_in(0), b, b + length);
    hadamard(q_ + b, length, ahead(k, b));
    finish<false>(q_, b, length, k, root(length), signs_out());
  }

  void forward_moved(int64_t b, int64_t length, int64_t k, const C* values) {
    if (k == 0) draw_places(b, length, 0, false);
    const uint32_t* signs = call_.kind == Kind::one_hot ? signs_in(0) : none_.data();
    finish<true>(values + origin(0, b), b, length, k, C(1), signs);
  }

  void forward_sparse(int64_t b, int64_t length, int64_t k, const C* values) {
    for (size_t r = 0; r < strata_.size(); r++) {
      draw_places(b, length, r, false);
      run<Gather<C, false>>(moved_, values + origin(r, b), constant(places_), length, r ? Ahead() : ahead(k, b));
      if (r == 0)
        run<Flipped<C, false>>(q_ + b, constant(moved_), signs_in(r), b, b + length);
      else
        run<Flipped<C, true>>(q_ + b, constant(moved_), signs_in(r), b, b + length);
    }
    finish<false>(q_, b, length, k, C(1), none_.data());
  }

  // theta of what is here of a block; q as of Finish.
  template <bool Moved>
  void finish(const C* q, int64_t b, int64_t length, int64_t k, C scale, const uint32_t* signs) {
    const int64_t begin = std::max(b, low_), end = std::min(b + length, high_);
    run<Finish<T, Moved>>(q, constant(places_ - b), signs, static_cast<C>(member_->factor) * scale, in(0, begin),
                          out(k, begin), begin, end, call_.past_cache, Moved ? ahead(k, 0) : Ahead());
  }

  // q = the gradients of a block, 0 where they are not here.
  void begin(int64_t b, int64_t length, int64_t k, C scale, const uint32_t* signs) {
    const int64_t begin = std::max(b, low_), end = std::min(b + length, high_);
    std::fill(q_ + b, q_ + begin, C(0));
    run<Begin<T>>(q_, signs, static_cast<C>(member_->factor) * scale, in(k, begin), begin, end);
    std::fill(q_ + end, q_ + b + length, C(0));
  }

  Ahead ahead(int64_t k, int64_t b) const {
    if (k > 0) return {};
    return {reinterpret_cast<const char*>(in(0, std::max(b, low_)) + call_.tile), sizeof(T)};
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

  void draw_places(int64_t b, int64_t length, size_t r, bool inverse) {
    const Words w = draw(member_->key, kPerm, start_ + b, static_cast<uint32_t>(r), call_.step);
    run<Places>(Permutation(w, __builtin_ctzll(length)), inverse, places_, length);
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
  Lines<C> held_, held_moved_;
  Lines<uint16_t> held_places_;
  C *q_, *moved_;
  uint16_t* places_;
  std::vector<C> flipped_;
  std::vector<uint32_t> none_;             // no signs
  std::vector<int64_t> origins_, slopes_;  // o_t and delta_t of each stratum
  std::vector<T> same_;
  Signs in_signs_, out_signs_;
  const Member* member_ = nullptr;
  int64_t start_ = 0, valid_ = 0, low_ = 0, high_ = 0;  // of the tile: its start, elements, and those that are here
};

}  // namespace wx::sub
