// rademacher and gaussian: every entry of P is drawn, 128 rows by 16 (or 1) columns at a time, and used at once.
//
// theta: 128 rows are added up in vectors, columns in their order. A gaussian draw has the entries of 4 rows, so its
// rows stand as [4][32], row 4 l + w at [w][l].
// z_bar: each column has 16 sums; of 128 rows, row 16 c + l is added to sum l in the order of c (gaussian: rows 4 l' +
// w with l' mod 16 = l, in the order of l' div 16 and w). Blocks of 128 rows follow in their order, within a group.
#include "draws.h"
#include "kinds.h"

namespace wx::sub {
namespace {

constexpr int kRows = 128, kSums = 16, kColumns = 32;

// sums[k][row] of one block of rows: sum_j flip(z_kj).
template <class C>
struct SignForward {
  template <int Bytes>
  WX_INLINE static void body(Key key, int64_t block, uint32_t step, const C* z, int64_t d, int64_t batch, C* sums) {
    using P = Packs<C, Bytes>;
    constexpr int kParts = 32 / P::N, kWords = kParts >= 8 ? 1 : (8 / kParts > 4 ? 4 : 8 / kParts);
    const SignMasks<C, Bytes> masks;
    alignas(64) uint32_t words[4][kColumns];
    for (int64_t j0 = 0; j0 < d; j0 += kColumns) {
      draw_lanes<kColumns, Bytes>(key, kEntry, block, static_cast<uint32_t>(j0), step, true, words);
      const int columns = static_cast<int>(std::min<int64_t>(kColumns, d - j0));
      for (int64_t k = 0; k < batch; k++)
        for (int w0 = 0; w0 < 4; w0 += kWords) {
          C* to = sums + k * kRows + w0 * 32;
          typename P::F acc[kWords * kParts];
          for (int i = 0; i < kWords * kParts; i++) get(acc[i], to + i * P::N);
          for (int j = 0; j < columns; j++) {
            const typename P::F value = typename P::F{} + z[k * d + j0 + j];
#pragma GCC unroll 4
            for (int w = 0; w < kWords; w++)
#pragma GCC unroll 16
              for (int part = 0; part < kParts; part++) {
                typename P::F x = value;
                masks.flip(x, words[w0 + w][j], part);
                acc[w * kParts + part] = acc[w * kParts + part] + x;
              }
          }
          for (int i = 0; i < kWords * kParts; i++) put(to + i * P::N, acc[i]);
        }
    }
  }
};

// sums[k][j][16] += what one block of rows g[k][128] gives.
template <class C>
struct SignBackward {
  template <int Bytes>
  WX_INLINE static void body(Key key, int64_t block, uint32_t step, const C* g, int64_t d, int64_t batch, C* sums) {
    using P = Packs<C, Bytes>;
    constexpr int kParts = kSums / P::N;
    const SignMasks<C, Bytes> masks;
    alignas(64) uint32_t words[4][kColumns];
    for (int64_t j0 = 0; j0 < d; j0 += kColumns) {
      draw_lanes<kColumns, Bytes>(key, kEntry, block, static_cast<uint32_t>(j0), step, true, words);
      const int columns = static_cast<int>(std::min<int64_t>(kColumns, d - j0));
      for (int64_t k = 0; k < batch; k++)
        for (int j = 0; j < columns; j++) {
          C* to = sums + (k * d + j0 + j) * kSums;
#pragma GCC unroll 8
          for (int part = 0; part < kParts; part++) {
            typename P::F sum = {}, x, before;
#pragma GCC unroll 8
            for (int c = 0; c < kRows / kSums; c++) {
              get(x, g + k * kRows + c * kSums + part * P::N);
              masks.flip(x, words[c / 2][j], c % 2 * kParts + part);
              sum = sum + x;
            }
            get(before, to + part * P::N);
            put(to + part * P::N, before + sum);
          }
        }
    }
  }
};

// Column j of 128 rows, row 4 l + w at [32 w + l].
template <class C, int Bytes>
WX_INLINE void coin_column(Key key, int64_t block, uint32_t step, int64_t j, C* values) {
  alignas(64) uint32_t words[4][32];
  draw_lanes<32, Bytes>(key, kEntry, block * 32, static_cast<uint32_t>(j), step, false, words);
  const uint32_t* all = words[0];
  for (int i = 0; i < kRows; i++) values[i] = static_cast<C>(coins(all[i]));
}

template <class C>
struct CoinForward {
  template <int Bytes>
  WX_INLINE static void body(Key key, int64_t block, uint32_t step, const C* z, int64_t d, int64_t batch, C* sums) {
    using P = Packs<C, Bytes>;
    alignas(64) C values[kRows];
    for (int64_t j = 0; j < d; j++) {
      coin_column<C, Bytes>(key, block, step, j, values);
      for (int64_t k = 0; k < batch; k++)
        for (int i = 0; i < kRows; i += P::N) {
          typename P::F value, sum;
          get(value, values + i);
          get(sum, sums + k * kRows + i);
          sum = sum + value * z[k * d + j];
          put(sums + k * kRows + i, sum);
        }
    }
  }
};

template <class C>
struct CoinBackward {
  template <int Bytes>
  WX_INLINE static void body(Key key, int64_t block, uint32_t step, const C* g, int64_t d, int64_t batch, C* sums) {
    using P = Packs<C, Bytes>;
    alignas(64) C values[kRows];
    for (int64_t j = 0; j < d; j++) {
      coin_column<C, Bytes>(key, block, step, j, values);
      for (int64_t k = 0; k < batch; k++)
        for (int l = 0; l < kSums; l += P::N) {
          typename P::F value, x, sum = {}, before;
          for (int row = l; row < kRows; row += kSums) {
            get(value, values + row);
            get(x, g + k * kRows + row);
            sum = sum + value * x;
          }
          C* to = sums + (k * d + j) * kSums + l;
          get(before, to);
          put(to, before + sum);
        }
    }
  }
};

// A block of 128 rows and what of it is here.
struct Block {
  const Member& member;
  int64_t at, low, high;  // low, high: rows of the block

  Block(const Call& call, Piece piece)
      : member(call.members[piece.member]),
        at(piece.at),
        low(std::max<int64_t>(0, member.first - at * kRows)),
        high(std::min<int64_t>(kRows, member.first + member.count - at * kRows)) {}
  int64_t offset(int64_t k, int64_t row) const { return k * member.count + at * kRows + row - member.first; }
};

int place(bool coin, int row) { return coin ? row % 4 * 32 + row / 4 : row; }

}  // namespace

void entrywise_forward(const Call& call) {
  const Pieces blocks(call.members, kRows);
  const bool coin = call.kind == Kind::gaussian;
  dispatch(call.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const C* z = static_cast<const C*>(call.z);
    const C* c = static_cast<const C*>(call.c);
    std::vector<C> scaled(z, z + call.batch * call.d);
    for (size_t k = 0; c && k < scaled.size(); k++) scaled[k] *= c[k % call.d];
    const C* from = scaled.data();
    ranges(blocks.count(), std::max<int64_t>(1, 4096 / call.d), [&](int64_t begin, int64_t end) {
      std::vector<C> sums(call.batch * kRows);
      for (int64_t i = begin; i < end; i++) {
        const Block block(call, blocks[i]);
        std::fill(sums.begin(), sums.end(), C(0));
        if (coin)
          run<CoinForward<C>>(block.member.key, block.at, call.step, from, call.d, call.batch, sums.data());
        else
          run<SignForward<C>>(block.member.key, block.at, call.step, from, call.d, call.batch, sums.data());
        const T* in = static_cast<const T*>(block.member.in);
        T* out = static_cast<T*>(block.member.out);
        const C factor = static_cast<C>(block.member.factor);
        for (int64_t k = 0; k < call.batch; k++)
          for (int64_t row = block.low; row < block.high; row++) {
            const T& theta0 = in[block.member.constant ? 0 : block.offset(0, row)];
            narrow(static_cast<C>(widen(theta0)) + sums[k * kRows + place(coin, static_cast<int>(row))] * factor,
                   out[block.offset(k, row)]);
          }
      }
    });
  });
}

void entrywise_backward(const Call& call) {
  const Pieces blocks(call.members, kRows);
  const bool coin = call.kind == Kind::gaussian;
  const int64_t count = groups(call.total, call.d, 1 << 12), n = call.batch * call.d;
  dispatch(call.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    std::vector<double> totals(count * n);
    ranges(count, 1, [&](int64_t begin, int64_t end) {
      std::vector<C> g(call.batch * kRows), sums;
      for (int64_t group = begin; group < end; group++) {
        sums.assign(n * kSums, C(0));
        for (int64_t i = group * blocks.count() / count; i < (group + 1) * blocks.count() / count; i++) {
          const Block block(call, blocks[i]);
          std::fill(g.begin(), g.end(), C(0));
          const T* in = static_cast<const T*>(block.member.in);
          const C factor = static_cast<C>(block.member.factor);
          for (int64_t k = 0; k < call.batch; k++)
            for (int64_t row = block.low; row < block.high; row++) {
              const T& value = in[block.member.constant ? 0 : block.offset(k, row)];
              g[k * kRows + place(coin, static_cast<int>(row))] = static_cast<C>(widen(value)) * factor;
            }
          const C* from = g.data();
          if (coin)
            run<CoinBackward<C>>(block.member.key, block.at, call.step, from, call.d, call.batch, sums.data());
          else
            run<SignBackward<C>>(block.member.key, block.at, call.step, from, call.d, call.batch, sums.data());
        }
        for (int64_t k = 0; k < n; k++)
          for (int l = 0; l < kSums; l++) totals[group * n + k] += static_cast<double>(sums[k * kSums + l]);
      }
    });
    finish_groups<C>(call, totals.data(), count);
  });
}

}  // namespace wx::sub
