// fastfood: Hadamard transforms of any length. A transform makes several passes over memory, each of some stages in
// shared memory: the first of neighbours, the later ones of pieces that lie apart. What comes before the first pass and
// after the last (signs, permutation, diagonal) is done where a pass reads and writes.
#pragma once
#include "entries.cuh"
#include "hadamard.cuh"

namespace wx::gpu::sub {

constexpr int kFastBits = log2_of(kThreads) + 4;  // of what a pass has in shared memory at once
constexpr int kPiece = 4;                         // bits of a piece, at the least

// All rows of one operator: `rows` of 2^length_bits numbers each, from one vector of 2^n_bits (the next power of d).
// global: one row; stacked: rows of 2^n_bits, each with its own signs and permutation.
struct Fastfood {
  const int64_t* step;
  Key key;
  int64_t dim, rows;
  int n_bits, length_bits;
  bool coins, stacked;

  __host__ __device__ int64_t n() const { return int64_t{1} << n_bits; }
  __host__ __device__ int64_t count() const { return rows << length_bits; }
  // Rows of vectors, forward; sums over parts of the long row, backward. Parts are of a fixed number of terms.
  __host__ int64_t vectors() const { return stacked ? rows : 1; }
  __host__ int64_t parts() const { return stacked ? rows : min(int64_t{64}, int64_t{1} << (length_bits - n_bits)); }

  __device__ Permutation permutation(int64_t start) const {
    return Permutation::of(draw(key, kFastPerm, start, 0, step_of(step)));
  }
  template <class C>
  __device__ C diagonal(C x, int64_t i) const {
    if (!coins) return flip(x, sign_word(key, kFastG, i, step_of(step)), i & 31);
    return mul(C(sub::coins(pick(draw(key, kFastG, i >> 2, 1, step_of(step)), i))), x);
  }
};

// What a pass reads and writes: numbers of rows that follow one another. Signs are those of the elements of a pass of
// neighbours, where `stream` names some.
template <class V>
struct Rows {
  V* data;

  static constexpr bool kSigns = false;
  __device__ V read(int64_t i, uint32_t) const { return data[i]; }
  __device__ void write(int64_t i, V x) const { data[i] = x; }
};

// B pad(z), once for each row.
template <class C>
struct SignedVector {
  const C* z;
  Fastfood f;

  static constexpr bool kSigns = true;
  static constexpr Stream kStream = kFastB;
  __device__ C read(int64_t i, uint32_t word) const {
    const int64_t k = i & (f.n() - 1);
    return flip(k < f.dim ? z[k] : C(0), word, static_cast<int>(i & 31));
  }
};

// G u[pi(i)].
template <class C>
struct Permuted {
  const C* u;
  Fastfood f;

  static constexpr bool kSigns = true;
  static constexpr Stream kStream = kFastG;
  __device__ C read(int64_t i, uint32_t word) const {
    const int64_t start = i >> f.length_bits << f.length_bits;
    const int64_t at = f.permutation(start)(static_cast<uint32_t>(i - start), f.length_bits);
    const C x = f.stacked ? u[start + at] : u[at & (f.n() - 1)];
    return f.coins ? f.diagonal(x, i) : flip(x, word, static_cast<int>(i & 31));
  }
};

// Multiplied with G on the way out.
template <class C>
struct WithDiagonal {
  C* data;
  Fastfood f;

  __device__ void write(int64_t i, C x) const { data[i] = f.diagonal(x, i); }
};

// The stages of one pass: of the 2^kFastBits numbers that a block has, the lower `piece` bits are neighbours, the
// others are the bits [stride, stride + kFastBits - piece) of their index.
struct Pass {
  int piece, stride, from, to;

  __device__ int64_t index(int64_t block, int j) const {
    if (piece == kFastBits) return (block << kFastBits) + j;
    const int apart = stride - piece;
    const int64_t base =
        (block >> apart << (stride + kFastBits - piece)) + ((block & ((int64_t{1} << apart) - 1)) << piece);
    return base + (static_cast<int64_t>(j >> piece) << stride) + (j & ((1 << piece) - 1));
  }
};

template <class V, class From, class To>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_pass(const Pass pass, const int64_t count, const Fastfood f, const From from, const To to) {
  __shared__ V x[(1 << kFastBits) + (1 << (kFastBits - 4))];
  __shared__ uint32_t words[1 << (kFastBits - 5)];
  constexpr int kApart = 1 << (kFastBits - 4);
  const Places places(kFastBits);
  const int64_t block = blockIdx.x;
  if constexpr (From::kSigns) {
    for (int i = threadIdx.x; i < 1 << (kFastBits - 7); i += kThreads) {
      const Words w = draw(f.key, From::kStream, (block << (kFastBits - 7)) + i, 0, step_of(f.step));
#pragma unroll
      for (int q = 0; q < 4; q++) words[4 * i + q] = w.at[q];
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kPerThread; k++) {
    const int j = k * kApart + static_cast<int>(threadIdx.x);
    const int64_t i = pass.index(block, j);
    x[places(j)] = i < count ? from.read(i, words[From::kSigns ? j >> 5 : 0]) : V(0);
  }
  __syncthreads();
  hadamard(x, kFastBits, pass.from, pass.to, 1 << kFastBits, [&](V(&v)[kPerThread], int place, int shift) {
#pragma unroll
    for (int k = 0; k < kPerThread; k++)
      if (const int64_t i = pass.index(block, place + (k << shift)); i < count) to.write(i, v[k]);
  });
}

// y = theta - theta0 of all tensors, from the concatenation; or the concatenation from the gradients.
template <class T, bool kForward>
__global__ void __launch_bounds__(kThreads)
    concatenation(const __grid_constant__ Table<Common, Part<T>, kSomeMembers> table, Compute<T>* whole,
                  const int64_t row) {
  const Common& o = table.common;
  const Part<T>& p = table.member_of(blockIdx.x);
  const Tile tile(o, p, blockIdx.x - p.first);
  for (int j = threadIdx.x; j < tile.length; j += kThreads) {
    if (!tile.has(j)) continue;
    const int64_t at = tile.at + j;
    Compute<T>& y = whole[p.start + tile.start + j];
    if constexpr (kForward)
      narrow(add(widen(p.from[p.same ? 0 : at]), mul(y, p.factor)), p.to[row * p.count + at]);
    else
      y = mul(widen(p.from[p.same ? 0 : row * p.count + at]), p.factor);
  }
}

// sums [parts, n]: what the elements of a part give to each element of the vector that they came from.
template <class C>
__global__ void __launch_bounds__(kThreads)
    unpermuted(const Fastfood f, const int64_t terms, const C* whole, double* sums, const int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t part = i >> f.n_bits, k = i & (f.n() - 1);
  const int64_t start = f.stacked ? part << f.n_bits : 0, first = f.stacked ? 0 : part * terms;
  const Permutation permutation = f.permutation(start).inverted();
  double sum = 0;
  for (int64_t m = first; m < first + terms; m++) {
    const auto v = static_cast<uint32_t>(k + (m << f.n_bits));
    sum += static_cast<double>(whole[start + permutation.back(v, f.length_bits)]);
  }
  sums[i] = sum;
}

// Groups of rows [parts, n], each row with its signs: [groups, n].
template <class C>
__global__ void __launch_bounds__(kThreads)
    add_rows(const Fastfood f, const double* rows, const int64_t parts, const Sums<double> s, const int64_t of_batch) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= f.dim) return;
  Total<C> total;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * s.tiles, end = min(parts, first + s.tiles);
  for (int64_t i = first; i < end; i++) {
    const int64_t sign = f.stacked ? (i << f.n_bits) + k : k;
    const uint32_t word = sign_word(f.key, kFastB, sign, step_of(f.step));
    total.add(flip(rows[(i << f.n_bits) + k], word, static_cast<int>(sign & 31)));
  }
  s.slice(static_cast<int>(blockIdx.y), 0, of_batch)[k] = total.sum + total.lost;
}

template <class C>
__global__ void __launch_bounds__(kThreads) clear(C* data, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) data[i] = 0;
}

inline unsigned blocks_for(int64_t count) { return static_cast<unsigned>(ceil_div<int64_t>(count, kThreads)); }

// H of rows of 2^bits numbers, unnormalized, `count` in all.
template <class V, class From, class To>
void launch_hadamard(const Fastfood& f, int bits, int64_t count, V* data, const From& from, const To& to,
                     cudaStream_t stream) {
  const int64_t tile = int64_t{1} << kFastBits;
  const auto blocks = static_cast<unsigned>(ceil_div(count, tile));
  const Pass first{kFastBits, 0, 0, min(bits, kFastBits)};
  const Rows<V> rows{data};
  if (bits <= kFastBits) {
    WX_LAUNCH((hadamard_pass<V, From, To>), blocks, kThreads, stream, first, count, f, from, to);
    return;
  }
  WX_LAUNCH((hadamard_pass<V, From, Rows<V>>), blocks, kThreads, stream, first, count, f, from, rows);
  for (int done = kFastBits; done < bits;) {
    const int stages = min(bits - done, kFastBits - kPiece);
    const Pass pass{kFastBits - stages, done, kFastBits - stages, kFastBits};
    done += stages;
    if (done == bits)
      WX_LAUNCH((hadamard_pass<V, Rows<V>, To>), blocks, kThreads, stream, pass, count, f, rows, to);
    else
      WX_LAUNCH((hadamard_pass<V, Rows<V>, Rows<V>>), blocks, kThreads, stream, pass, count, f, rows, rows);
  }
}

template <bool kForward, class T>
void launch_concatenation(const std::vector<Part<T>>& parts, Common common, Compute<T>* whole, int64_t row,
                          cudaStream_t stream) {
  common.bits = kEntryBits;
  const auto tiles = [](const Part<T>& p) { return p.tiles(kEntryBits); };
  for_each_table<kSomeMembers>(parts, common, tiles, [&](const auto& table) {
    WX_LAUNCH((concatenation<T, kForward>), table.items, kThreads, stream, table, whole, row);
  });
}

// u [vectors, n], whole [rows, length]: scratch memory.
template <class T>
void launch_fastfood(const std::vector<Part<T>>& parts, const Common& common, const Fastfood& f, const Compute<T>* z,
                     Compute<T>* u, Compute<T>* whole, cudaStream_t stream) {
  using C = Compute<T>;
  for (int64_t b = 0; b < common.batch; b++) {
    launch_hadamard(f, f.n_bits, f.vectors() << f.n_bits, u, SignedVector<C>{z + b * f.dim, f}, Rows<C>{u}, stream);
    launch_hadamard(f, f.length_bits, f.count(), whole, Permuted<C>{u, f}, Rows<C>{whole}, stream);
    launch_concatenation<true>(parts, common, whole, b, stream);
  }
}

// whole [rows, length] and sums [parts, n]: scratch memory. `data` as in Sums.
template <class T>
Sums<double> launch_fastfood_sums(const std::vector<Part<T>>& parts, const Common& common, const Fastfood& f,
                                  Compute<T>* whole, double* sums, double* data, cudaStream_t stream) {
  using C = Compute<T>;
  auto groups = Sums<double>::of_columns(f.n(), data);
  groups.cut(static_cast<int>(f.parts()), most_column_groups(f.n()));
  groups.total_groups = groups.groups;
  if (!data) return groups;
  const int64_t count = f.parts() << f.n_bits;
  for (int64_t b = 0; b < common.batch; b++) {
    WX_LAUNCH(clear<C>, blocks_for(f.count()), kThreads, stream, whole, f.count());
    launch_concatenation<false>(parts, common, whole, b, stream);
    launch_hadamard(f, f.length_bits, f.count(), whole, Rows<C>{whole}, WithDiagonal<C>{whole, f}, stream);
    WX_LAUNCH(unpermuted<C>, blocks_for(count), kThreads, stream, f, f.count() / count, whole, sums, count);
    launch_hadamard(f, f.n_bits, count, sums, Rows<double>{sums}, Rows<double>{sums}, stream);
    WX_LAUNCH(add_rows<C>, dim3(blocks_for(f.dim), groups.groups), kThreads, stream, f, sums, f.parts(), groups, b);
  }
  return groups;
}

}  // namespace wx::gpu::sub
