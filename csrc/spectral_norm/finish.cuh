// What follows the products: the sum of the partial sums, the state, and the weight times its factor.
#pragma once
#include "products.cuh"

namespace wx::gpu::sn {

// sum[i] = parts [n_parts, n], in their order, where part k counts 2^exponents[k]; squares[block] = this block's share
// of <sum, with>. Warps take every kWarps-th part of 32 columns.
template <class C>
__device__ void gather(const C* parts, int n_parts, int64_t n, const int* exponents, int* exponent, const C* with,
                       C* sum, double* squares, int block, int blocks) {
  __shared__ C shared[kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int most = 0;
  bool scaled = false;
  if (exponents) {
    double high = kNoExponent, low = kNoExponent;
    for (int k = threadIdx.x; k < n_parts; k += kThreads) {
      high = fmax(high, static_cast<double>(exponents[k]));
      low = fmax(low, static_cast<double>(-exponents[k]));
    }
    most = static_cast<int>(block_max<kThreads>(high));
    scaled = block_max<kThreads>(low) != -most;
    if (block == 0 && threadIdx.x == 0) *exponent = most;
  }
  double square = 0;
  for (int64_t begin = static_cast<int64_t>(block) * kGatherColumns; begin < n;
       begin += static_cast<int64_t>(blocks) * kGatherColumns) {
    const int64_t i = begin + lane;
    C value = 0;
    if (i < n) {
      if (scaled) {
        for (int k = warp; k < n_parts; k += kWarps) value += power_of_two<C>(exponents[k] - most) * parts[k * n + i];
      } else {
#pragma unroll 8
        for (int k = warp; k < n_parts; k += kWarps) value += parts[k * n + i];
      }
    }
    shared[threadIdx.x] = value;
    __syncthreads();
    if (warp == 0 && i < n) {
      for (int k = 1; k < kWarps; k++) value += shared[k * 32 + lane];
      sum[i] = value;
      square += static_cast<double>(value) * static_cast<double>(with ? with[i] : value);
    }
    __syncthreads();
  }
  square = block_sum<kThreads>(square);
  if (threadIdx.x == 0) squares[block] = square;
}

template <class T>
__device__ void gather(const Forward<T>& f, const Step& step, int index) {
  const Cut& cut = f.cut;
  const Work<Compute<T>> work(f.work, cut);
  const bool fused = cut.fused(f.x_first) && f.n_iter > 0;
  const int64_t n = step.gather_t ? cut.m : cut.columns();
  const int blocks = cut.gather_blocks(n), at = step.iteration % 2 * cut.tiles();
  if (index >= blocks) return;
  if (step.gather_t)
    gather(work.t_part, cut.t_parts(), n, fused ? work.exponents : nullptr, work.exponent, f.n_iter ? nullptr : f.y0,
           work.t, work.t2 + at, index, blocks);
  else
    gather<Compute<T>>(work.z_part, cut.z_parts(), n, fused ? work.exponents : nullptr, work.exponent, nullptr, work.z,
                       work.z2 + at, index, blocks);
}

// Loads that a thread has under way when it scales. sm_120 has less memory bandwidth to fill, and spills with four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLoads = 2;
#else
constexpr int kLoads = 4;
#endif

// out = s w, n numbers side by side.
template <class T, class O>
__device__ void scale_line(const T* w, O* out, int n, Compute<T> s) {
  constexpr int kWide = 16 / (sizeof(T) > sizeof(O) ? sizeof(T) : sizeof(O)), kAtOnce = kWide > 4 ? kLoads / 2 : kLoads;
  using From = Pack<T, kWide>;
  using To = Pack<O, kWide>;
  int done = 0;
  if (aligned(w, sizeof(From)) && aligned(out, sizeof(To))) {
    const From* from = reinterpret_cast<const From*>(w);
    To* to = reinterpret_cast<To*>(out);
    const int packs = n / kWide;
    for (int i = threadIdx.x; i < packs; i += kAtOnce * kThreads) {
      From x[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (i + k * kThreads < packs) x[k] = from[i + k * kThreads];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        if (i + k * kThreads >= packs) continue;
        To y;
#pragma unroll
        for (int e = 0; e < kWide; e++) narrow(static_cast<Compute<T>>(widen(x[k].at[e]) * s), y.at[e]);
        to[i + k * kThreads] = y;
      }
    }
    done = packs * kWide;
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < n; i += kThreads)
    narrow(static_cast<Compute<T>>(widen(w[i]) * s), out[i]);
}

template <class T, class O>
__device__ void scale_tile(const Forward<T>& f, O* out, int index, const Chip& chip, int used, Compute<T> s) {
  const Cut& cut = f.cut;
  const Tile tile(cut, index);
  const int bytes = batch_bytes<T>(cut);
  for (int first = 0, k = 0; first < tile.lines(); first += cut.lines, k++) {
    const int lines = min(cut.lines, tile.lines() - first);
    const int64_t at = tile.offset + first * cut.b;
    const T* place = reinterpret_cast<const T*>(chip.place(used, k, bytes));
    const int runs = tile.columns == cut.b ? 1 : lines, run = lines / runs * tile.columns;
    for (int i = 0; i < runs; i++)
      scale_line(place ? place + i * run : f.w + at + i * cut.b, out + at + i * cut.b, run, s);
  }
}

// Writes the state and out. Each block of the member writes its tile, and its share of the state.
template <class T>
__device__ void finish(const Forward<T>& f, int index, const Options& o, const Chip& chip, int used) {
  using C = Compute<T>;
  const Cut& cut = f.cut;
  const Work<C> work(f.work, cut);
  Lengths lengths;
  if (f.n_iter == 0)
    lengths.sigma = total(work.t2, cut.t_parts() > 1 ? cut.gather_blocks(cut.m) : cut.tiles());
  else
    lengths = Lengths(f, work, f.n_iter - 1, o.eps, false);
  const C sigma = static_cast<C>(lengths.sigma);
  const bool moved = f.n_iter > 0 && sigma - sigma == 0 && sigma != 0;
  const int64_t begin = static_cast<int64_t>(index) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(cut.tiles()) * kThreads;
  for (int64_t i = begin; i < cut.m; i += stride)
    f.y[i] = moved ? static_cast<C>(static_cast<double>(work.t[i]) * lengths.t) : f.y0[i];
  for (int64_t i = begin; i < cut.columns(); i += stride) {
    int64_t c = i;  // x is written in its own order
    if (f.inner) {
      const auto outer = static_cast<uint32_t>(cut.columns()) / static_cast<uint32_t>(f.inner);
      const uint32_t row = static_cast<uint32_t>(i) / outer;
      c = (static_cast<uint32_t>(i) - row * outer) * f.inner + row;
    }
    f.x[i] = moved ? static_cast<C>(static_cast<double>(work.z[c]) * lengths.z) : f.x0[i];
  }
  if (begin == 0) *f.sigma = sigma;
  if (!f.out) return;
  const double gain = f.gain ? static_cast<double>(*f.gain) : 1.0;
  const C s = static_cast<C>(Scale(static_cast<double>(sigma), o.bound, o.bounded).s * gain);
  switch (o.out) {
    case Format::kFloat:
      return scale_tile(f, static_cast<float*>(f.out), index, chip, used, s);
    case Format::kDouble:
      return scale_tile(f, static_cast<double*>(f.out), index, chip, used, s);
    case Format::kHalf:
      return scale_tile(f, static_cast<fp16*>(f.out), index, chip, used, s);
    case Format::kBfloat:
      return scale_tile(f, static_cast<bf16*>(f.out), index, chip, used, s);
  }
}

}  // namespace wx::gpu::sn
