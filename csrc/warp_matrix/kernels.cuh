// Warp matrices on a GPU: affine.h has a row of them. The matrices are written once and coalesced, their gradients read
// where a row has entries that count; one launch each.
#pragma once
#include "../common/device.cuh"
#include "affine.h"

#ifndef WX_WM_THREADS
#define WX_WM_THREADS 256
#endif

namespace wx::gpu::wm {

using namespace wx::wm;

constexpr int kThreads = WX_WM_THREADS;
constexpr int kSharing = 8;  // threads that write a row: each finds out anew where it comes from

template <class C>
__global__ void __launch_bounds__(kThreads)
    matrices(const C* params, C* out, const Grid<C> grid, const Kind kind, int64_t rows) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kSharing;
  if (row >= rows) return;
  const int taps = grid.taps(), lane = threadIdx.x % kSharing;
  const int64_t b = divide(row, taps);
  C t[6];
  matrix(kind, params + b * params_of(kind), t);
  const Source<C> source(grid, t, static_cast<int>(row - b * taps));
  for (int q = lane; q < taps; q += kSharing)
    out[row * taps + q] = source.y.of(q / grid.width) * source.x.of(q % grid.width);
}

// A warp has a condition, its lanes the rows.
template <class C>
__global__ void __launch_bounds__(32)
    gradients(const C* grad, const C* params, C* dparams, const Grid<C> grid, const Kind kind) {
  const int taps = grid.taps();
  const int64_t b = blockIdx.x;
  const C* own = params + b * params_of(kind);
  C t[6], dt[6] = {};
  matrix(kind, own, t);
  for (int p = threadIdx.x; p < taps; p += 32)
    Source<C>(grid, t, p).add_gradient(grid, grad + (b * taps + p) * taps, dt);
#pragma unroll
  for (int k = 0; k < 6; k++)
    for (int offset = 16; offset; offset /= 2) dt[k] += __shfl_xor_sync(0xffffffffu, dt[k], offset);
  if (threadIdx.x == 0) of_params(kind, dt, own, dparams + b * params_of(kind));
}

template <class C>
void launch_matrices(const C* params, C* out, const Grid<C>& grid, Kind kind, int64_t batch, cudaStream_t stream) {
  const int64_t rows = batch * grid.taps(), blocks = (rows * kSharing + kThreads - 1) / kThreads;
  WX_LAUNCH(matrices<C>, static_cast<unsigned>(blocks), kThreads, stream, params, out, grid, kind, rows);
}

template <class C>
void launch_gradients(const C* grad, const C* params, C* dparams, const Grid<C>& grid, Kind kind, int64_t batch,
                      cudaStream_t stream) {
  WX_LAUNCH(gradients<C>, static_cast<unsigned>(batch), 32, stream, grad, params, dparams, grid, kind);
}

}  // namespace wx::gpu::wm
