// fastfood: u = H_n (B pad(z)), q = G u[pi], y = H q, for the whole concatenation or in blocks of n.
//
// A long transform is made of blocks of 2^12 that stay in L1 and of passes over rows of blocks, eight at a time.
#include "draws.h"
#include "hadamard.h"
#include "kinds.h"
#include "passes.h"

namespace wx::sub {
namespace {

constexpr int64_t kBlock = 1 << 12;

template <class C, int R>
struct Across {  // the stages h .. R h / 2 of columns [begin, end) of the R rows from x on
  template <int Bytes>
  WX_INLINE static void body(C* x, int64_t h, int64_t begin, int64_t end) {
    using H = Hadamard<C, Bytes>;
    for (int64_t c = begin; c < end; c += H::N) {
      typename H::F v[R];
      for (int i = 0; i < R; i++) get(v[i], x + c + i * h);
      H::template butterflies<R>(v, 1);
      for (int i = 0; i < R; i++) put(x + c + i * h, v[i]);
    }
  }
};

template <int R, class C>
void across(C* x, int64_t length, int64_t h) {
  const int64_t per_row = h / kBlock;
  ranges(length / R / kBlock, 8, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++)
      run<Across<C, R>>(x + k / per_row * R * h, h, k % per_row * kBlock, (k % per_row + 1) * kBlock);
  });
}

// The stages from kBlock on of a transform whose blocks are done.
template <class C>
void long_stages(C* x, int64_t length) {
  for (int64_t h = kBlock; h < length;) {
    const int64_t left = length / h;
    if (left >= 8)
      across<8>(x, length, h), h *= 8;
    else if (left >= 4)
      across<4>(x, length, h), h *= 4;
    else
      across<2>(x, length, h), h *= 2;
  }
}

template <class C>
void long_hadamard(C* x, int64_t length) {
  if (length <= kBlock) return hadamard(x, length);
  ranges(length / kBlock, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) hadamard(x + k * kBlock, kBlock);
  });
  long_stages(x, length);
}

int64_t power_of_two(int64_t least) {
  int64_t n = 1;
  while (n < least) n *= 2;
  return n;
}

constexpr int64_t kPart = 256;

// pi(first ..) & mask, kPart of them.
struct Indices {
  template <int Bytes>
  WX_INLINE static void body(Permutation pi, uint32_t first, uint32_t mask, uint32_t* to) {
    for (uint32_t l = 0; l < kPart; l++) to[l] = pi(first + l) & mask;
  }
};

// x_i *= the coins of row base + i, from <= i < to; base is a multiple of 128.
template <class C>
struct Coins {
  template <int Bytes>
  WX_INLINE static void body(Key key, int64_t base, uint32_t step, C* x, int64_t from, int64_t to) {
    alignas(64) uint32_t words[4][32];
    C values[128];
    draw_lanes<32, Bytes>(key, kFfG, base / 4, 1, step, false, words);
    for (int l = 0; l < 32; l++)
      for (int w = 0; w < 4; w++) values[4 * l + w] = static_cast<C>(coins(words[w][l]));
    for (int64_t i = from; i < to; i++) x[i] = values[i] * x[i];
  }
};

// The operator of a call; `at` is a row of P, `length` that of its transforms.
class Operator {
 public:
  explicit Operator(const Call& call)
      : n(power_of_two(call.d)), length(call.global ? power_of_two(call.total) : n), call_(call) {
    STD_TORCH_CHECK(length <= int64_t{1} << 30, "subspace: fastfood transforms have at most 2^30 elements");
  }
  int64_t blocks() const { return (call_.total + length - 1) / length; }

  // u_k = flip(z_k) by B of the transform at `start`, which is a multiple of n.
  template <class C>
  void flip_b(C* u, int64_t start) const {
    flip_all(u, kFfB, start, start + n);
  }
  Permutation permutation(int64_t start) const {
    return {draw(call_.key0, kFfPerm, start, 0, call_.step), __builtin_ctzll(length)};
  }
  // x_j = G x_j for the rows start + begin .. start + end: a block, or a transform.
  template <class C>
  void diagonal(C* x, int64_t begin, int64_t end) const {
    if (!call_.binomial) return flip_all(x, kFfG, begin, end);
    for (int64_t base = begin / 128 * 128; base < end; base += 128)
      run<Coins<C>>(call_.key0, base, call_.step, x - begin + base, std::max(begin - base, int64_t{0}),
                    std::min<int64_t>(128, end - base));
  }

  // to_j = u[pi(first + j) mod n], or the sums of what stands there.
  template <class C>
  void moved(C* to, const C* u, const Permutation& pi, int64_t first, int64_t count) const {
    uint32_t at[kPart];
    for (int64_t j = 0; j < count; j += kPart) {
      const int64_t part = std::min(kPart, count - j);
      run<Indices>(pi, static_cast<uint32_t>(first + j), static_cast<uint32_t>(n - 1), +at);
      for (int64_t l = 0; l < part; l++) to[j + l] = u[at[l]];
    }
  }
  template <class C>
  void collect(double* u, const C* from, const Permutation& pi, int64_t first, int64_t count) const {
    uint32_t at[kPart];
    for (int64_t j = 0; j < count; j += kPart) {
      const int64_t part = std::min(kPart, count - j);
      run<Indices>(pi, static_cast<uint32_t>(first + j), static_cast<uint32_t>(n - 1), +at);
      for (int64_t l = 0; l < part; l++) u[at[l]] += static_cast<double>(from[j + l]);
    }
  }

  const int64_t n, length;

 private:
  // Of rows [begin, end), whole draws unless there are fewer than 128 rows in all.
  template <class C>
  void flip_all(C* x, Stream stream, int64_t begin, int64_t end) const {
    constexpr int64_t kChunk = Signs::kChunk;
    uint32_t words[kChunk / 32];
    for (int64_t i = begin; i < end;) {
      const int64_t next = std::min(end, (i / kChunk + 1) * kChunk), from = i / 128,
                    draws = (next - 1) / 128 - from + 1;
      if (draws < 8)
        for (int64_t k = 0; k < draws; k++) {
          const Words w = draw(call_.key0, stream, from + k, 0, call_.step);
          std::copy(w.at, w.at + 4, words + 4 * k);
        }
      else
        run<SignChunk>(call_.key0, stream, i / kChunk, 0u, call_.step, +words);
      const int64_t base = draws < 8 ? from * 128 : i / kChunk * kChunk;
      C* at = x + (i - begin);
      run<Flipped<C, false>>(at, static_cast<const C*>(at), static_cast<const uint32_t*>(words), i - base, next - base);
      i = next;
    }
  }

  const Call& call_;
};

template <class C>
std::vector<C> pad(const Call& call, int64_t k, int64_t n) {
  const C* z = static_cast<const C*>(call.z) + k * call.d;
  const C* c = static_cast<const C*>(call.c);
  std::vector<C> u(n);
  for (int64_t j = 0; j < call.d; j++) u[j] = c ? z[j] * c[j] : z[j];
  return u;
}

// f(member, first element, offset in the block, count) for what lies in the rows [begin, end).
template <class F>
void each_part(const Call& call, int64_t begin, int64_t end, const F& f) {
  for (const Member& m : call.members) {
    const int64_t low = std::max(begin, m.start + m.first), high = std::min(end, m.start + m.first + m.count);
    if (low < high) f(m, low - m.start - m.first, low - begin, high - low);
  }
}

template <class T>
void write(const Call& call, int64_t k, const Compute<T>* y, int64_t begin, int64_t end) {
  using C = Compute<T>;
  each_part(call, begin, end, [&](const Member& m, int64_t first, int64_t offset, int64_t count) {
    const T* in = static_cast<const T*>(m.in);
    T* out = static_cast<T*>(m.out) + k * m.count + first;
    const C factor = static_cast<C>(m.factor);
    for (int64_t i = 0; i < count; i++)
      narrow(static_cast<C>(widen(in[m.constant ? 0 : first + i])) + y[offset + i] * factor, out[i]);
  });
}

template <class T>
void read(const Call& call, int64_t k, Compute<T>* y, int64_t begin, int64_t end) {
  using C = Compute<T>;
  std::fill(y, y + (end - begin), C(0));
  each_part(call, begin, end, [&](const Member& m, int64_t first, int64_t offset, int64_t count) {
    const T* in = static_cast<const T*>(m.in) + (m.constant ? 0 : k * m.count + first);
    const C factor = static_cast<C>(m.factor);
    for (int64_t i = 0; i < count; i++) y[offset + i] = static_cast<C>(widen(in[m.constant ? 0 : i])) * factor;
  });
}

template <class T>
void global_forward(const Call& call, const Operator& op) {
  using C = Compute<T>;
  const int64_t piece = std::min(op.length, kBlock);
  const Permutation pi = op.permutation(0);
  const Scratch<C> q(op.length);
  for (int64_t k = 0; k < call.batch; k++) {
    std::vector<C> u = pad<C>(call, k, op.n);
    op.flip_b(u.data(), 0);
    long_hadamard(u.data(), op.n);
    ranges(op.length / piece, 8, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        C* to = q.data() + b * piece;
        op.moved(to, u.data(), pi, b * piece, piece);
        op.diagonal(to, b * piece, (b + 1) * piece);
        hadamard(to, piece);
      }
    });
    long_stages(q.data(), op.length);
    ranges((call.total + piece - 1) / piece, 8, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++)
        write<T>(call, k, q.data() + b * piece, b * piece, std::min(call.total, (b + 1) * piece));
    });
  }
}

template <class T>
void stacked_forward(const Call& call, const Operator& op) {
  using C = Compute<T>;
  ranges(op.blocks(), std::max<int64_t>(1, 16384 / op.n), [&](int64_t begin, int64_t end) {
    std::vector<C> q(op.n);
    for (int64_t b = begin; b < end; b++) {
      const int64_t start = b * op.n;
      const Permutation pi = op.permutation(start);
      for (int64_t k = 0; k < call.batch; k++) {
        std::vector<C> u = pad<C>(call, k, op.n);
        op.flip_b(u.data(), start);
        hadamard(u.data(), op.n);
        op.moved(q.data(), u.data(), pi, 0, op.n);
        op.diagonal(q.data(), start, start + op.n);
        hadamard(q.data(), op.n);
        write<T>(call, k, q.data(), start, std::min(call.total, start + op.n));
      }
    }
  });
}

// u[pi(j)] += r_j in float64: [groups][n], each group a piece of the transform.
template <class T>
void global_backward(const Call& call, const Operator& op, double* sums) {
  using C = Compute<T>;
  const int64_t piece = std::min(op.length, kBlock), count = groups(op.length, op.n, 1 << 16);
  const Permutation pi = op.permutation(0);
  const Scratch<C> r(op.length);
  for (int64_t k = 0; k < call.batch; k++) {
    ranges(op.length / piece, 8, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        C* to = r.data() + b * piece;
        read<T>(call, k, to, b * piece, (b + 1) * piece);
        hadamard(to, piece);
      }
    });
    long_stages(r.data(), op.length);
    std::vector<double> parts(count * op.n);
    ranges(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++) {
        double* u = parts.data() + g * op.n;
        for (int64_t b = g * (op.length / piece) / count; b < (g + 1) * (op.length / piece) / count; b++) {
          C* from = r.data() + b * piece;
          op.diagonal(from, b * piece, (b + 1) * piece);
          op.collect(u, from, pi, b * piece, piece);
        }
      }
    });
    for (int64_t g = 1; g < count; g++)
      for (int64_t j = 0; j < op.n; j++) parts[j] += parts[g * op.n + j];
    long_hadamard(parts.data(), op.n);
    op.flip_b(parts.data(), 0);
    std::copy(parts.begin(), parts.begin() + call.d, sums + k * call.d);
  }
}

template <class T>
void stacked_backward(const Call& call, const Operator& op, double* sums, int64_t count) {
  using C = Compute<T>;
  const int64_t n = call.batch * call.d;
  ranges(count, 1, [&](int64_t begin, int64_t end) {
    std::vector<C> r(op.n);
    std::vector<double> u(op.n);
    for (int64_t g = begin; g < end; g++)
      for (int64_t b = g * op.blocks() / count; b < (g + 1) * op.blocks() / count; b++) {
        const int64_t start = b * op.n;
        const Permutation pi = op.permutation(start);
        for (int64_t k = 0; k < call.batch; k++) {
          read<T>(call, k, r.data(), start, start + op.n);
          hadamard(r.data(), op.n);
          op.diagonal(r.data(), start, start + op.n);
          std::fill(u.begin(), u.end(), 0.0);
          op.collect(u.data(), r.data(), pi, 0, op.n);
          hadamard(u.data(), op.n);
          op.flip_b(u.data(), start);
          for (int64_t j = 0; j < call.d; j++) sums[g * n + k * call.d + j] += u[j];
        }
      }
  });
}

}  // namespace

void fastfood_forward(const Call& call) {
  const Operator op(call);
  dispatch(call.dtype, [&](auto t) {
    using T = decltype(t);
    call.global ? global_forward<T>(call, op) : stacked_forward<T>(call, op);
  });
}

void fastfood_backward(const Call& call) {
  const Operator op(call);
  const int64_t count = call.global ? 1 : groups(call.total, call.d, 1 << 14);
  dispatch(call.dtype, [&](auto t) {
    using T = decltype(t);
    std::vector<double> sums(count * call.batch * call.d);
    call.global ? global_backward<T>(call, op, sums.data()) : stacked_backward<T>(call, op, sums.data(), count);
    finish_groups<Compute<T>>(call, sums.data(), count);
  });
}

}  // namespace wx::sub
