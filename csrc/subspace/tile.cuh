// A tile of a tensor, which blocks it has, which columns they read, and the random words they take. A block of threads
// makes them once for its tile, into shared memory.
#pragma once
#include "exact.cuh"

namespace wx::gpu::sub {

constexpr int kMaxBits = 14;           // of a tile
constexpr int kUsualBits = 12;         // kernels that know it have their places as constants
constexpr int kPerThread = 16;         // numbers that a thread holds at once
constexpr int kStaticBytes = 6 << 10;  // of shared memory, at the most

// What all members of a call share. The columns of stratum r, unrolled by a tile so that a window never wraps, are
// columns [low + r tile, low + width + (r + 1) tile) of zx.
struct Common {
  const int64_t* step;
  int64_t dim;
  int bits;  // a tile has 2^bits elements
  int strata, batch;
  bool packed, permuted, with_signs;  // permuted: one_hot, sparse; else block_hadamard

  __host__ __device__ int tile() const { return 1 << bits; }
  __host__ __device__ int64_t low(int r) const { return r * dim / strata; }
  __host__ __device__ int64_t width(int r) const { return low(r + 1) - low(r); }
  __host__ __device__ int64_t unrolled() const { return dim + (static_cast<int64_t>(strata) << bits); }
  __host__ __device__ int stratum_of(int64_t k) const { return static_cast<int>(((k + 1) * strata - 1) / dim); }
};

// The local elements of a tensor: `count` of its n, from `begin` on.
template <class T>
struct Part {
  const T* from;  // theta0, or a gradient
  T* to;          // theta
  int64_t count, begin, n, start;
  Key key;
  Compute<T> factor;
  bool same;  // all of `from` is one number
  int first;

  __host__ int64_t tiles(int bits) const { return ((begin + count - 1) >> bits) - (begin >> bits) + 1; }
};

// A thread takes kPerThread numbers of a tile, or of a large one several times as many.
__host__ inline int tile_threads(int bits) { return max(32, min(kThreads, (1 << bits) / kPerThread)); }

struct Tile {
  int64_t start;    // of its first element in the tensor
  int64_t at;       // and in the local elements; negative where it begins before them
  int length;       // elements of the tensor
  int begin, end;   // of those, the local ones
  bool full, mine;  // nothing is missing: of the tile; of the local elements

  template <class T>
  __device__ Tile(const Common& o, const Part<T>& p, int index) {
    start = ((p.begin >> o.bits) + index) << o.bits;
    at = start - p.begin;
    length = static_cast<int>(min(p.n - start, static_cast<int64_t>(o.tile())));
    begin = static_cast<int>(max(-at, int64_t{0}));
    end = static_cast<int>(min(p.count - at, static_cast<int64_t>(length)));
    full = length == o.tile();
    mine = begin == 0 && end == o.tile();
  }
  __device__ bool has(int j) const { return j >= begin && j < end; }
  // The block of element j is of 2^level elements.
  __device__ int level(int j) const { return 31 - __clz(length ^ j); }
};

// Element j of a block reads column `at` + j of zx, j counted from the start of the tile.
struct Block {
  int64_t at;
  Permutation permutation;
};

__device__ inline int64_t remainder(int64_t x, int64_t y) { return x - divide(x, y) * y; }

// The column of zx of the first element of the block that begins at `start`.
template <class T>
__device__ int64_t column_of(const Common& o, const Part<T>& p, int64_t start, int r) {
  const int64_t low = o.low(r), width = o.width(r);
  const int64_t base = low + (static_cast<int64_t>(r) << o.bits);
  if (o.packed) return base + remainder(p.start + start, width);
  const Words w = draw(p.key, kSetup, 0, r, 0);
  const int64_t turn = width > o.tile() ? static_cast<int64_t>(w.at[1] * static_cast<uint64_t>(width) >> 32) : 0;
  const int64_t first = static_cast<int64_t>(w.at[0] * static_cast<uint64_t>(width) >> 32);
  return base + remainder(first + start + divide(start, width) * turn, width);
}

// Shared memory for what a tile draws.
struct Drawn {
  Block* blocks;       // [kMaxBits + 1], by level
  uint32_t *in, *out;  // signs, 32 elements a word

  __device__ uint32_t sign_in(int j) const { return in[j >> 5]; }
  __device__ uint32_t sign_out(int j) const { return out[j >> 5]; }
};

__device__ inline void draw_signs(const Common& o, Key key, Stream stream, int64_t start, int r, uint32_t step,
                                  int call, uint32_t* words) {
  const Words w = draw(key, stream, (start >> 7) + call, r, step);
  const int skip = static_cast<int>(start >> 5 & 3), n = o.tile() >> 5;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (const int to = 4 * call + i - skip; to >= 0 && to < n) words[to] = o.with_signs ? w.at[i] : 0;
}

// By all threads; a barrier must follow. Blocks and signs fall to different warps.
template <class T>
__device__ void draw_tile(const Common& o, const Part<T>& p, const Tile& tile, int r, bool invert, const Drawn& to) {
  const uint32_t step = step_of(o.step);
  const int calls = max(1, o.tile() >> 7), streams = o.permuted ? 1 : 2;
  for (int i = threadIdx.x; i < calls * streams; i += blockDim.x) {
    if (i < calls)
      draw_signs(o, p.key, kSignIn, tile.start, r, step, i, to.in);
    else
      draw_signs(o, p.key, kSignOut, tile.start, r, step, i - calls, to.out);
  }
  const int level = static_cast<int>(blockDim.x - 1 - threadIdx.x);
  if (level > o.bits || !(tile.length >> level & 1)) return;
  const int before = tile.length >> level >> 1 << level << 1;  // elements of larger blocks
  Block b{column_of(o, p, tile.start + before, r) - before, {}};
  if (o.permuted) {
    b.permutation = Permutation::of(draw(p.key, kPerm, tile.start + before, r, step));
    if (invert) b.permutation = b.permutation.inverted();
  }
  to.blocks[level] = b;
}

// f(table, bits): as few tables as possible, a small one for a short list; and the bits of a tile where they are the
// usual ones, else 0.
template <class T, class Items, class F>
void for_each_tile_table(const std::vector<Part<T>>& parts, const Common& o, const Items& tiles, const F& f) {
  constexpr int kMost = kManyMembers<Common, Part<T>> - 256 / static_cast<int>(sizeof(Part<T>)) - 1;
  constexpr std::integral_constant<int, kUsualBits> usual{};
  if (o.bits != usual)
    return for_each_table<kMost>(parts, o, tiles, [&](const auto& t) { f(t, std::integral_constant<int, 0>{}); });
  if (parts.size() <= kFewMembers)
    return for_each_table<kFewMembers>(parts, o, tiles, [&](const auto& t) { f(t, usual); });
  for_each_table<kMost>(parts, o, tiles, [&](const auto& t) { f(t, usual); });
}

// The elements q, q + n, ..., q + (P - 1) n of a tile, as they lie in memory. Those of others count as zero.
template <class T, int P>
struct Held {
  T at[P];

  __device__ void load(const Part<T>& p, const Tile& tile, int64_t row, int q, int n) {
    const T* from = p.from + (p.same ? 0 : tile.at + row * p.count + q);
    const int step = p.same ? 0 : n;
    if (tile.mine) {
#pragma unroll
      for (int k = 0; k < P; k++) at[k] = from[k * step];
    } else {
#pragma unroll
      for (int k = 0; k < P; k++)
        if (tile.has(q + k * n))
          at[k] = from[k * step];
        else
          narrow(Compute<T>(0), at[k]);
    }
  }
};

}  // namespace wx::gpu::sub
