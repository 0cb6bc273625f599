// Spectral normalization on a GPU: reference.py has the maths. Launches follow one another, no block waits for another.
//
// A weight is [a, m, b] in memory and read as the matrix W of m rows and a b columns, c = i b + j. Every product is two
// launches: chunks of W give partial sums, then `gather` adds the chunks in order and squares the result. How W is cut
// depends on its shape alone, so results are the same on every GPU and in every run.
#pragma once
#include <algorithm>

#include "../common/device.cuh"

namespace wx::gpu::sn {

constexpr int kThreads = 256;
constexpr int kTile = 1024;   // numbers of x in shared memory
constexpr int kWarpRows = 4;  // rows that a warp works on at once
constexpr int kRows = kThreads / 32 * kWarpRows;
constexpr int kBlocks = 512;  // wanted for a product
constexpr int kMaxChunks = 64;
constexpr int kMaxParts = 1024;  // blocks of a kernel whose partial sums every later block adds up

struct Matrix {
  int64_t a, m, b;

  __host__ __device__ int64_t columns() const { return a * b; }
  __host__ __device__ int64_t numel() const { return a * m * b; }
  // Where column c begins; its elements are b apart.
  __device__ int64_t column(int64_t c) const {
    if (a == 1) return c;
    const int64_t i = divide(c, b);
    return i * m * b + (c - i * b);
  }
};

// A vector before it was scaled to unit length: the blocks' sums of its squares. None: it has unit length.
struct Squares {
  const double* parts = nullptr;
  int count = 0;
};

__device__ inline double total(Squares s) {
  double sum = 0;
  for (int i = threadIdx.x; i < s.count; i += kThreads) sum += s.parts[i];
  return block_sum<kThreads>(sum);
}

// What a vector is divided by; NaN stays NaN.
__device__ inline double divisor(Squares s, double eps) {
  if (!s.parts) return 1;
  const double length = sqrt(total(s));
  return length < eps ? eps : length;
}

// part[chunk, r] = sum of W[r, c] x[c] over the columns of the chunk. grid: (blocks of kRows rows, chunks).
template <class T>
__global__ void __launch_bounds__(kThreads) times_columns(const T* w, Matrix s, const Compute<T>* x, Squares squares,
                                                          double eps, int64_t chunk, Compute<T>* part) {
  using C = Compute<T>;
  __shared__ C tile[kTile];
  const C scale = static_cast<C>(divisor(squares, eps));
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32 * kWarpRows;
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, s.columns());
  C sum[kWarpRows] = {};
  for (int64_t c = begin; c < end; c += kTile) {
    const int n = static_cast<int>(min(static_cast<int64_t>(kTile), end - c));
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += kThreads) tile[j] = x[c + j] / scale;
    __syncthreads();
    for (int j = lane; j < n; j += 32) {
      const T* at = w + s.column(c + j);
#pragma unroll
      for (int k = 0; k < kWarpRows; k++)
        if (row + k < s.m) sum[k] += widen(at[(row + k) * s.b]) * tile[j];
    }
  }
#pragma unroll
  for (int k = 0; k < kWarpRows; k++) {
    for (int offset = 16; offset; offset /= 2) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], offset);
    if (lane == 0 && row + k < s.m) part[blockIdx.y * s.m + row + k] = sum[k];
  }
}

// part[chunk, c] = sum of W[r, c] y[r] over the rows of the chunk. grid: (blocks of kThreads columns, chunks).
template <class T>
__global__ void __launch_bounds__(kThreads) times_rows(const T* w, Matrix s, const Compute<T>* y, Squares squares,
                                                       double eps, int64_t chunk, Compute<T>* part) {
  using C = Compute<T>;
  __shared__ C tile[kThreads];
  const C scale = static_cast<C>(divisor(squares, eps));
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = c < s.columns();
  const T* at = w + (inside ? s.column(c) : 0);
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, s.m);
  C sum[4] = {};  // loads in flight, and a smaller rounding error than one long sum
  for (int64_t r = begin; r < end; r += kThreads) {
    const int n = static_cast<int>(min(static_cast<int64_t>(kThreads), end - r));
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n) tile[threadIdx.x] = y[r + threadIdx.x] / scale;
    __syncthreads();
    if (!inside) continue;  // the same for every tile, and no barrier is skipped
    int k = 0;
    for (; k + 4 <= n; k += 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += widen(at[(r + k + i) * s.b]) * tile[k + i];
    }
    for (; k < n; k++) sum[0] += widen(at[(r + k) * s.b]) * tile[k];
  }
  if (inside) part[blockIdx.y * s.columns() + c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// out[i] = sum over k of part[k, i]; sums[block] = the block's share of <out, with>, or of <out, out> without `with`.
template <class C>
__global__ void __launch_bounds__(kThreads)
    gather(const C* part, int chunks, int64_t n, const C* with, C* out, double* sums) {
  double sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    C value = part[i];
    for (int k = 1; k < chunks; k++) value += part[k * n + i];
    out[i] = value;
    sum += static_cast<double>(value) * static_cast<double>(with ? with[i] : value);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// s(sigma) and s'(sigma) of reference.py.
struct Scale {
  double s = 1, ds = 0;
  __device__ Scale(double sigma, double bound, bool bounded) {
    const double c = bounded ? bound : 1.0;
    if (sigma != sigma || (bounded ? sigma > c : sigma != 0)) {
      s = c / sigma;
      ds = -c / (sigma * sigma);
    }
  }
};

struct Options {
  int64_t n_iter;
  double eps;
  bool v_first;
  double bound;
  bool bounded;
};

// y belongs to the rows of the matrix, x to its columns.
template <class C>
struct Vectors {
  const C *y0, *x0;  // unit, as they came in
  C *y, *x;          // where they go to
  const C *t, *z;    // W x and W'y of the last iteration
  Squares t2, z2;    // for n_iter = 0: <y0, t> in t2
  bool x_first;
  C* sigma;
};

// Writes out, and the state: grid-stride over all three.
template <class T, class O>
__global__ void __launch_bounds__(kThreads)
    finish(const T* w, O* out, Matrix s, Vectors<Compute<T>> vec, const Compute<T>* gain, Options o) {
  using C = Compute<T>;
  const double second = total(vec.x_first || o.n_iter == 0 ? vec.t2 : vec.z2);
  const double length = sqrt(second);
  const C sigma = static_cast<C>(o.n_iter == 0 ? second : second / (length < o.eps ? o.eps : length));
  const bool moved = o.n_iter > 0 && sigma - sigma == 0 && sigma != 0;
  const C t_scale = static_cast<C>(moved ? divisor(vec.t2, o.eps) : 1);
  const C z_scale = static_cast<C>(moved ? divisor(vec.z2, o.eps) : 1);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < s.m; i += stride) vec.y[i] = moved ? vec.t[i] / t_scale : vec.y0[i];
  for (int64_t i = first; i < s.columns(); i += stride) vec.x[i] = moved ? vec.z[i] / z_scale : vec.x0[i];
  if (first == 0) *vec.sigma = sigma;
  const double g = gain ? static_cast<double>(*gain) : 1.0;
  const C scale = static_cast<C>(Scale(static_cast<double>(sigma), o.bound, o.bounded).s * g);
  for (int64_t i = first; i < s.numel(); i += stride) narrow(static_cast<C>(widen(w[i]) * scale), out[i]);
}

// sums[block] = the block's share of <g, w>.
template <class G, class T>
__global__ void __launch_bounds__(kThreads) inner(const G* g, const T* w, int64_t n, double* sums) {
  using C = Compute<T>;
  double sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride)
    sum += static_cast<double>(static_cast<C>(widen(g[i])) * static_cast<C>(widen(w[i])));
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// dw = gain (s g + s' <g, w> y x'), dgain = s <g, w>.
template <class G, class T>
__global__ void __launch_bounds__(kThreads)
    update(const G* g, T* dw, Matrix s, const Compute<T>* y, const Compute<T>* x, const Compute<T>* sigma,
           const Compute<T>* gain, double bound, bool bounded, Squares sums, Compute<T>* dgain) {
  using C = Compute<T>;
  const double radial = total(sums), factor = gain ? static_cast<double>(*gain) : 1.0;
  const Scale scale(static_cast<double>(*sigma), bound, bounded);
  const C p = static_cast<C>(factor * scale.s), q = static_cast<C>(factor * scale.ds * radial);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  if (first == 0) *dgain = static_cast<C>(scale.s * radial);
  for (int64_t i = first; i < s.numel(); i += stride) {
    const int64_t line = divide(i, s.b), slab = divide(line, s.m);
    const C direction = y[line - slab * s.m] * x[slab * s.b + (i - line * s.b)];
    narrow(static_cast<C>(p * static_cast<C>(widen(g[i])) + q * direction), dw[i]);
  }
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How a matrix is cut.
struct Plan {
  Matrix s;
  int64_t row_blocks, column_blocks;  // of the two products
  int64_t column_chunk, row_chunk;    // and the length of their chunks
  int column_chunks, row_chunks;
  int t_parts, z_parts;  // blocks of gather
  int parts;             // blocks of the passes over all elements

  explicit Plan(Matrix matrix) : s(matrix) {
    row_blocks = ceil_div(s.m, kRows);
    column_blocks = ceil_div(s.columns(), kThreads);
    column_chunk = chunk(s.columns(), row_blocks, kTile);
    row_chunk = chunk(s.m, column_blocks, kThreads);
    column_chunks = static_cast<int>(ceil_div(s.columns(), column_chunk));
    row_chunks = static_cast<int>(ceil_div(s.m, row_chunk));
    t_parts = blocks(s.m);
    z_parts = blocks(s.columns());
    parts = blocks(s.numel());
  }

  int64_t numbers() const {  // of workspace: partial sums, t, z
    return std::max(column_chunks * s.m, row_chunks * s.columns()) + s.m + s.columns();
  }

 private:
  static int64_t chunk(int64_t length, int64_t blocks, int64_t unit) {
    const int64_t wanted = std::clamp<int64_t>(kBlocks / blocks, 1, kMaxChunks);
    return ceil_div(ceil_div(length, wanted), unit) * unit;
  }
  static int blocks(int64_t n) {
    return static_cast<int>(std::clamp<int64_t>(ceil_div(n, 4 * kThreads), 1, kMaxParts));
  }
};

constexpr int64_t kSums = 2 * kMaxParts;  // doubles of workspace

template <class T, class O>
struct Forward {
  using C = Compute<T>;

  const T* w;
  O* out;
  Plan plan;
  const C *y0, *x0;
  C *y, *x, *sigma;
  const C* gain;
  Options options;
  bool x_first;
  C* numbers;  // workspace
  double* sums;

  void run(cudaStream_t stream) const {
    const Matrix s = plan.s;
    C *t = numbers, *z = t + s.m, *part = z + s.columns();
    const Squares t2{sums, plan.t_parts}, z2{sums + kMaxParts, plan.z_parts};
    const auto left = [&](const C* from, Squares squares, const C* with) {  // t = W x
      const dim3 grid(static_cast<unsigned>(plan.row_blocks), plan.column_chunks);
      WX_LAUNCH(times_columns<T>, grid, kThreads, stream, w, s, from, squares, options.eps, plan.column_chunk, part);
      WX_LAUNCH(gather<C>, plan.t_parts, kThreads, stream, part, plan.column_chunks, s.m, with, t, sums);
    };
    const auto right = [&](const C* from, Squares squares) {  // z = W'y
      const dim3 grid(static_cast<unsigned>(plan.column_blocks), plan.row_chunks);
      const C* none = nullptr;
      WX_LAUNCH(times_rows<T>, grid, kThreads, stream, w, s, from, squares, options.eps, plan.row_chunk, part);
      WX_LAUNCH(gather<C>, plan.z_parts, kThreads, stream, part, plan.row_chunks, s.columns(), none, z,
                sums + kMaxParts);
    };
    for (int64_t i = 0; i < options.n_iter; i++) {
      if (x_first) {
        right(i ? t : y0, i ? t2 : Squares{});
        left(z, z2, nullptr);
      } else {
        left(i ? z : x0, i ? z2 : Squares{}, nullptr);
        right(t, t2);
      }
    }
    if (options.n_iter == 0) left(x0, Squares{}, y0);
    const Vectors<C> vectors{y0, x0, y, x, t, z, t2, z2, x_first, sigma};
    const auto write = finish<T, O>;
    WX_LAUNCH(write, plan.parts, kThreads, stream, w, out, s, vectors, gain, options);
  }
};

template <class G, class T>
struct Backward {
  using C = Compute<T>;

  const G* g;
  const T* w;
  T* dw;
  Plan plan;
  const C *y, *x, *sigma, *gain;
  double bound;
  bool bounded;
  C* dgain;
  double* sums;  // workspace

  void run(cudaStream_t stream) const {
    const auto dot = inner<G, T>;
    const auto write = update<G, T>;
    const Squares parts{sums, plan.parts};
    WX_LAUNCH(dot, plan.parts, kThreads, stream, g, w, plan.s.numel(), sums);
    WX_LAUNCH(write, plan.parts, kThreads, stream, g, dw, plan.s, y, x, sigma, gain, bound, bounded, parts, dgain);
  }
};

}  // namespace wx::gpu::sn
