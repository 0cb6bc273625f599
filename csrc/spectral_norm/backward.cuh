// The backward kernels: <g, W>, then dW = gain (s g + s' <g, W> y x') and dgain = s <g, W>.
//
// Elementwise: tiles are pieces of memory, of a size that depends on the number of elements alone. A thread updates the
// elements that it read, so it finds g where it put it: in shared memory, if there is room.
#pragma once
#include <vector>

#include "forward.cuh"

namespace wx::gpu::sn {

constexpr int kPieces = 512;                    // of a weight, about
constexpr int kPieceElements = kTileBytes / 8;  // at the least; a weight of up to twice as many is one piece

struct BackwardOptions {
  double bound;
  bool bounded;
  int kept_bytes;  // of shared memory
};

template <class G, class T>
struct Backward {
  using C = Compute<T>;

  const G* g;
  const T* w;
  T* dw;
  const C *y, *x, *sigma, *gain;
  C* dgain;
  double* sums;  // [pieces]
  int64_t m, b, numel, inner, columns;
  int64_t piece;  // elements
  int first;

  __host__ __device__ int pieces() const { return static_cast<int>(ceil_div(numel, piece)); }
  __host__ static int64_t piece_of(int64_t numel) {
    if (numel <= 2 * kPieceElements) return 2 * kPieceElements;
    const int64_t wanted = ceil_div<int64_t>(numel, kPieces);
    return ceil_div<int64_t>(wanted, kPieceElements) * kPieceElements;
  }
};

template <class G, class T, int N>
using BackwardTable = Table<BackwardOptions, Backward<G, T>, N>;

template <class P, class T>
__device__ P load_pack(const T* at, bool wide, int n) {
  P pack;
  if (wide) return *reinterpret_cast<const P*>(at);
#pragma unroll
  for (int e = 0; e < static_cast<int>(sizeof(P) / sizeof(T)); e++) pack.at[e] = at[e < n ? e : 0];
  return pack;
}

// sums[piece] = its share of <g, w>; g stays in `kept` where that is given.
template <class G, class T>
__device__ void inner(const Backward<G, T>& f, int piece, G* kept) {
  using C = Compute<T>;
  constexpr int kWide = 16 / (sizeof(G) > sizeof(T) ? sizeof(G) : sizeof(T)), kAtOnce = kWide > 4 ? 2 : 4;
  using Gs = Pack<G, kWide>;
  using Ts = Pack<T, kWide>;
  const int64_t begin = piece * f.piece;
  const int n = static_cast<int>(least(f.piece, f.numel - begin));
  const G* g = f.g + begin;
  const T* w = f.w + begin;
  const bool wide_g = aligned(g, sizeof(Gs)), wide_w = aligned(w, sizeof(Ts));
  double sum = 0;
  for (int i = threadIdx.x * kWide; i < n; i += kAtOnce * kThreads * kWide) {
    Gs gs[kAtOnce];
    Ts ws[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int at = i + k * kThreads * kWide;
      if (at >= n) continue;
      gs[k] = load_pack<Gs>(g + at, wide_g && at + kWide <= n, n - at);
      ws[k] = load_pack<Ts>(w + at, wide_w && at + kWide <= n, n - at);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int at = i + k * kThreads * kWide;
      if (at >= n) continue;
      if (kept) *reinterpret_cast<Gs*>(kept + at) = gs[k];
#pragma unroll
      for (int e = 0; e < kWide; e++)
        if (at + e < n)
          sum += static_cast<double>(static_cast<C>(widen(gs[k].at[e])) * static_cast<C>(widen(ws[k].at[e])));
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) f.sums[piece] = sum;
}

template <class G, class T>
__device__ void update(const Backward<G, T>& f, int piece, const BackwardOptions& o, const G* kept) {
  using C = Compute<T>;
  constexpr int kWide = 16 / (sizeof(G) > sizeof(T) ? sizeof(G) : sizeof(T)), kAtOnce = kWide > 4 ? 1 : 2;
  using Gs = Pack<G, kWide>;
  using Ts = Pack<T, kWide>;
  const double radial = total(f.sums, f.pieces()), gain = f.gain ? static_cast<double>(*f.gain) : 1.0;
  const Scale scale(static_cast<double>(*f.sigma), o.bound, o.bounded);
  const C p = static_cast<C>(gain * scale.s), q = static_cast<C>(gain * scale.ds * radial);
  const int64_t begin = piece * f.piece;
  const int n = static_cast<int>(least(f.piece, f.numel - begin));
  if (piece == 0 && threadIdx.x == 0) *f.dgain = static_cast<C>(scale.s * radial);
  const G* g = kept ? kept : f.g + begin;
  T* dw = f.dw + begin;
  const bool wide_g = aligned(g, sizeof(Gs)), wide_w = aligned(dw, sizeof(Ts));
  const Vector<C> x = turned(f.x, f.inner, f.columns, 0);
  for (int i = threadIdx.x * kWide; i < n; i += kAtOnce * kThreads * kWide) {
    Gs gs[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int at = i + k * kThreads * kWide;
      if (at < n) gs[k] = load_pack<Gs>(g + at, wide_g && (kept || at + kWide <= n), n - at);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int at = i + k * kThreads * kWide;
      if (at >= n) continue;
      int64_t line = divide(begin + at, f.b), j = begin + at - line * f.b, slab = divide(line, f.m);
      int64_t row = line - slab * f.m;
      Ts out;
#pragma unroll
      for (int e = 0; e < kWide; e++) {
        if (at + e < n)
          narrow(static_cast<C>(p * static_cast<C>(widen(gs[k].at[e])) + q * (f.y[row] * x[slab * f.b + j])),
                 out.at[e]);
        if (++j == f.b) {
          j = 0;
          if (++row == f.m) row = 0, slab++;
        }
      }
      if (wide_w && at + kWide <= n) {
        *reinterpret_cast<Ts*>(dw + at) = out;
      } else {
#pragma unroll
        for (int e = 0; e < kWide; e++)
          if (at + e < n) dw[at + e] = out.at[e];
      }
    }
  }
}

// Two launches, a block for each piece; a weight that is one piece is done in the first.
template <class G, class T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_phase(const __grid_constant__ BackwardTable<G, T, N> table, int phase) {
  WX_DYNAMIC_SHARED(shared);
  const int item = phase ? table.items - 1 - static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x);
  const Backward<G, T>& f = table.member_of(item);
  const bool alone = f.pieces() == 1;
  G* const kept = alone ? reinterpret_cast<G*>(shared) : nullptr;
  if (phase == 0) inner(f, item - f.first, kept);
  if (phase == (alone ? 0 : 1)) update(f, item - f.first, table.common, kept);
}

// One launch, in which g stays on chip.
template <class G, class T, int N>
__global__ void __launch_bounds__(kThreads) backward_resident(const __grid_constant__ BackwardTable<G, T, N> table) {
  WX_DYNAMIC_SHARED(shared);
  for (int phase = 0; phase < 2; phase++) {
    int64_t used = 0;
    for (int item = blockIdx.x; item < table.items; item += gridDim.x) {
      const Backward<G, T>& f = table.member_of(item);
      const int64_t bytes = least(f.piece, ceil_div<int64_t>(f.numel, 16) * 16) * sizeof(G);
      G* const kept = used + bytes <= table.common.kept_bytes ? reinterpret_cast<G*>(shared + used) : nullptr;
      if (phase == 0)
        inner(f, item - f.first, kept);
      else
        update(f, item - f.first, table.common, kept);
      used += bytes;
    }
    if (phase == 0) grid_sync();
  }
}

template <class G, class T, int N>
void launch_backward(const std::vector<Backward<G, T>>& members, const BackwardOptions& options, Path path,
                     cudaStream_t stream) {
  BackwardTable<G, T, N> table;
  table.common = options;
  table.count = static_cast<int>(members.size());
  table.items = 0;
  int64_t bytes = 0, one = 0, largest = 0;
  int alone = 0;
  for (int i = 0; i < table.count; i++) {
    Backward<G, T>& f = table.at[i] = members[i];
    f.first = table.items;
    table.items += f.pieces();
    const int64_t piece = least(f.piece, ceil_div<int64_t>(f.numel, 16) * 16) * sizeof(G);
    bytes += f.pieces() * piece;
    largest = std::max(largest, piece);
    if (f.pieces() == 1) one = std::max(one, piece), alone++;
  }
  const auto resident = backward_resident<G, T, N>;
  if (path != Path::kPhases && alone < table.count && cooperative_launch()) {
    const int most = max_shared_bytes() - kStaticBytes;
    for (const int shared : {most / 2 - (2 << 10), most}) {
      const int blocks = std::min(table.items, shared > 0 ? resident_blocks(resident, kThreads, shared) : 0);
      if (blocks <= 0) continue;
      // Blocks hold whole pieces, and not equally many.
      const bool fits = bytes / blocks + largest <= shared;
      if (!fits && !(path == Path::kResident && shared == most)) continue;
      table.common.kept_bytes = shared;
      WX_LAUNCH_COOPERATIVE(resident, blocks, kThreads, shared, stream, table);
      return;
    }
  }
  const auto by_phase = backward_phase<G, T, N>;
  resident_blocks(by_phase, kThreads, static_cast<int>(one));  // allows so much shared memory
  for (int phase = 0; phase < (alone < table.count ? 2 : 1); phase++)
    WX_LAUNCH_SHARED(by_phase, table.items, kThreads, phase == 0 ? one : 0, stream, table, phase);
}

template <class G, class T>
void launch_backward(const std::vector<Backward<G, T>>& members, const BackwardOptions& options, Path path,
                     cudaStream_t stream) {
  constexpr size_t kMost = kManyMembers<BackwardOptions, Backward<G, T>>;
  if (members.size() <= kFewMembers) return launch_backward<G, T, kFewMembers>(members, options, path, stream);
  for (size_t i = 0; i < members.size(); i += kMost) {
    const auto end = members.begin() + std::min(i + kMost, members.size());
    launch_backward<G, T, kMost>({members.begin() + i, end}, options, path, stream);
  }
}

}  // namespace wx::gpu::sn
