// theta of the tiled kinds: a block of threads makes a tile. theta0 is read once and theta written once; the columns of
// a tile lie side by side in zx, and come through shared memory.
#pragma once
#include "hadamard.cuh"

namespace wx::gpu::sub {

// zx [batch, unrolled()]: z times its scales, each stratum repeated until it is a tile longer than itself.
template <class C>
__global__ void __launch_bounds__(kThreads) unroll(const C* z, const C* c, C* zx, const Common o) {
  const int64_t n = o.unrolled(), i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  int r = 0;
  if (o.strata > 1) {  // the last stratum that begins at i or before
    int high = o.strata - 1;
    while (r < high) {
      const int middle = (r + high + 1) / 2;
      if (o.low(middle) + (static_cast<int64_t>(middle) << o.bits) <= i)
        r = middle;
      else
        high = middle - 1;
    }
  }
  const int64_t low = o.low(r), k = low + remainder(i - low - (static_cast<int64_t>(r) << o.bits), o.width(r));
  for (int b = 0; b < o.batch; b++) {
    const C value = z[b * o.dim + k];
    zx[b * n + i] = c ? mul(value, c[k]) : value;
  }
}

// fl(factor L^-1/2) for L = 2^level.
__device__ inline float scaled(float factor, int level) {
  const float power = bit_cast<float>(static_cast<uint32_t>(127 - (level >> 1)) << 23);
  return mul(factor, level & 1 ? power * bit_cast<float>(0x3F3504F3u) : power);
}
__device__ inline double scaled(double factor, int level) {
  const double power = bit_cast<double>(static_cast<uint64_t>(1023 - (level >> 1)) << 52);
  return mul(factor, level & 1 ? power * bit_cast<double>(uint64_t{0x3FE6A09E667F3BCC}) : power);
}

// The columns of zx that a tile reads, signed or not, to where their places in the tile are.
template <bool kSigned, class C>
__device__ void fill(C* x, const C* zx, const Tile& tile, const Drawn& drawn, const Places& places, int bits) {
  const int n = (1 << bits) / kPerThread;
  const C* from = zx + (tile.full ? drawn.blocks[bits].at : 0);
  for (int q = threadIdx.x; q < n; q += blockDim.x) {
    C value[kPerThread];
    if (tile.full) {
#pragma unroll
      for (int k = 0; k < kPerThread; k++) value[k] = from[q + k * n];
    } else {
#pragma unroll
      for (int k = 0; k < kPerThread; k++) {
        const int j = q + k * n;
        value[k] = j < tile.length ? from[drawn.blocks[tile.level(j)].at + j] : C(0);
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      const int j = q + k * n;
      x[places(j)] = kSigned ? flip(value[k], drawn.sign_in(j), j & 31) : value[k];
    }
  }
}

// theta = fl(theta0 + y) for the elements q, q + n, ... of a tile.
template <class T, int P>
__device__ void write(const Part<T>& p, const Tile& tile, int row, const Held<T, P>& theta0, const Compute<T> (&y)[P],
                      int q, int n) {
  T* to = p.to + tile.at + row * p.count + q;
#pragma unroll
  for (int k = 0; k < P; k++) {
    T theta;
    narrow(add(widen(theta0.at[k]), y[k]), theta);
    if (tile.mine || tile.has(q + k * n)) to[k * n] = theta;
  }
}

template <class T, int N, int kBits>
__global__ void __launch_bounds__(kThreads, kTogether<Compute<T>, kBits>)
    block_hadamard(const __grid_constant__ Table<Common, Part<T>, N> table, const Compute<T>* zx) {
  using C = Compute<T>;
  WX_DYNAMIC_SHARED(raw);
  __shared__ Block blocks[kMaxBits + 1];
  __shared__ uint32_t in[1 << (kMaxBits - 5)], out[1 << (kMaxBits - 5)];
  C* x = reinterpret_cast<C*>(raw);
  const Common& o = table.common;
  const Part<T>& p = table.member_of(blockIdx.x);
  const Tile tile(o, p, blockIdx.x - p.first);
  const Drawn drawn{blocks, in, out};
  const int bits = kBits ? kBits : o.bits, n = (1 << bits) / kPerThread, own = threadIdx.x;
  const Places places(bits);

  Held<T, kPerThread> theta0;  // under way while the columns are transformed
  if (own < n) theta0.load(p, tile, 0, own, n);
  draw_tile(o, p, tile, 0, false, drawn);
  for (int b = 0; b < o.batch; b++) {
    __syncthreads();
    fill<true>(x, zx + b * o.unrolled(), tile, drawn, places, bits);
    __syncthreads();
    hadamard<kBits>(x, bits, tile.length, [&](C(&v)[kPerThread], int q, int) {
      const C factor = scaled(p.factor, bits);
#pragma unroll
      for (int k = 0; k < kPerThread; k++) {
        const int j = q + k * n;
        const C by = tile.full ? factor : scaled(p.factor, j < tile.length ? tile.level(j) : 0);
        v[k] = flip(mul(v[k], by), drawn.sign_out(j), j & 31);
      }
      write(p, tile, b, theta0, v, q, n);
      const int next = q + static_cast<int>(blockDim.x);  // of a large tile, or its first for the next of the batch
      if (next < n || n > static_cast<int>(blockDim.x)) theta0.load(p, tile, 0, next < n ? next : own, n);
    });
  }
}

// one_hot: the permuted columns of the tile. sparse: their sum over strata.
template <class T, int N, int kBits>
__global__ void __launch_bounds__(kThreads, kTogether<Compute<T>, kBits>)
    one_hot(const __grid_constant__ Table<Common, Part<T>, N> table, const Compute<T>* zx) {
  using C = Compute<T>;
  constexpr int P = kPerThread / 2;
  WX_DYNAMIC_SHARED(raw);
  __shared__ Block blocks[kMaxBits + 1];
  __shared__ uint32_t in[1 << (kMaxBits - 5)];
  C* x = reinterpret_cast<C*>(raw);
  const Common& o = table.common;
  const Part<T>& p = table.member_of(blockIdx.x);
  const Tile tile(o, p, blockIdx.x - p.first);
  const Drawn drawn{blocks, in, nullptr};
  const int bits = kBits ? kBits : o.bits, n = (1 << bits) / P;
  const Places places(0);
  bool first = true;
  for (int b = 0; b < o.batch; b++) {
    for (int begin = 0; begin < n; begin += blockDim.x) {
      const int q = begin + threadIdx.x;
      Held<T, P> theta0;
      if (q < n) theta0.load(p, tile, 0, q, n);
      C y[P];
      for (int r = 0; r < o.strata; r++) {
        if (first || o.strata > 1) {
          __syncthreads();
          draw_tile(o, p, tile, r, false, drawn);
          first = false;
        }
        if (begin == 0 || o.strata > 1) {
          __syncthreads();
          fill<false>(x, zx + b * o.unrolled(), tile, drawn, places, bits);
          __syncthreads();
        }
        if (q >= n) continue;
        const Permutation whole = blocks[bits].permutation;  // of a full tile
#pragma unroll
        for (int k = 0; k < P; k++) {
          const int j = q + k * n;
          C value = 0;
          if (tile.full) {
            value = x[whole(j, bits)];
          } else if (j < tile.length) {
            const int level = tile.level(j), within = (1 << level) - 1;
            value = x[(j & ~within) + static_cast<int>(blocks[level].permutation(j & within, level))];
          }
          value = flip(value, drawn.sign_in(j), j & 31);
          y[k] = r ? add(y[k], value) : value;
        }
      }
      if (q >= n) continue;
#pragma unroll
      for (int k = 0; k < P; k++) y[k] = mul(y[k], p.factor);
      write(p, tile, b, theta0, y, q, n);
    }
  }
}

template <class T>
void launch_theta(const std::vector<Part<T>>& parts, const Common& common, const Compute<T>* z, const Compute<T>* c,
                  Compute<T>* zx, cudaStream_t stream) {
  using C = Compute<T>;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(common.unrolled(), kThreads));
  WX_LAUNCH(unroll<C>, blocks, kThreads, stream, z, c, zx, common);
  const int threads = tile_threads(common.bits), shared = static_cast<int>(Places::count(common.bits) * sizeof(C));
  const auto tiles = [&](const Part<T>& p) { return p.tiles(common.bits); };
  for_each_tile_table(parts, common, tiles, [&](const auto& table, auto bits) {
    constexpr int kN = std::decay_t<decltype(table)>::kMembers, kBits = decltype(bits)::value;
    const auto kernel = common.permuted ? one_hot<T, kN, kBits> : block_hadamard<T, kN, kBits>;
    allow_shared(kernel, threads, shared);
    WX_LAUNCH_SHARED(kernel, table.items, threads, shared, stream, table, zx);
  });
}

}  // namespace wx::gpu::sub
