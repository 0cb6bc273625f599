// H x in shared memory, by one block: four stages in registers at a time, the tile goes through shared memory between.
#pragma once
#include "tile.cuh"

namespace wx::gpu::sub {

// Where element p lies in shared memory. A gap after every 16 keeps threads that are 16 elements apart off one bank.
struct Places {
  int gap;
  __host__ __device__ explicit Places(int bits) : gap(bits >= 8 ? 4 : 31) {}
  __host__ __device__ int operator()(int p) const { return p + (p >> gap); }
  // of p + k 2^shift, all bits of k being 0 in p
  __device__ int step(int shift) const { return shift == 0 ? 1 : (1 << shift) + (1 << shift >> gap); }
  __host__ __device__ static int count(int bits) { return Places(bits)(1 << bits); }
};

// The stages [from, to) of those four that a thread holds: v[k] is element place + k 2^shift.
template <bool kFull, class C>
__device__ void butterflies(C (&v)[kPerThread], int place, int shift, int from, int to, int length) {
#pragma unroll
  for (int bit = 0; bit < 4; bit++) {
    const int stage = shift + bit;
    if (stage < from || stage >= to) continue;
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      if (k >> bit & 1) continue;
      const int j = place + (k << shift);
      if (!kFull && (j >= length || (length ^ j) < 2 << stage)) continue;  // its block is shorter
      const C a = v[k], b = v[k | 1 << bit];
      v[k] = add(a, b);
      v[k | 1 << bit] = sub(a, b);
    }
  }
}

// One pass: up to four stages from `stage` on, kPerThread numbers of each thread at a time.
template <class C, class Sink>
__device__ void hadamard_stages(C* x, int bits, int stage, int to, int length, const Sink& sink) {
  const Places places(bits);
  const bool last = stage + 4 >= to;
  const int shift = last && to == bits ? bits - 4 : min(stage, bits - 4), step = places.step(shift);
  for (int q = threadIdx.x; q < 1 << (bits - 4); q += blockDim.x) {
    const int place = (q & ((1 << shift) - 1)) + (q >> shift << (shift + 4));
    C* at = x + places(place);
    C v[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; k++) v[k] = at[k * step];
    if (length == 1 << bits)
      butterflies<true>(v, place, shift, stage, to, length);
    else
      butterflies<false>(v, place, shift, stage, to, length);
    if (last) {
      sink(v, place, shift);
    } else {
#pragma unroll
      for (int k = 0; k < kPerThread; k++) at[k * step] = v[k];
    }
  }
}

// The stages h = 2^from, ..., 2^(to - 1) of the 2^bits numbers in `x`, each block of the `length` first by itself.
// sink(v, place, shift) gets the results, kPerThread at a time, v[k] being element place + k 2^shift. In the last pass
// the bits that a thread holds are the highest, so that neighbours hold neighbours. A barrier comes before.
template <class C, class Sink>
__device__ void hadamard(C* x, int bits, int from, int to, int length, const Sink& sink) {
  for (int stage = from;; stage += 4) {
    hadamard_stages(x, bits, stage, to, length, sink);
    if (stage + 4 >= to) return;
    __syncthreads();
  }
}

// All stages of a tile; kBits, where it is not 0, are its bits: then all places are known to the compiler.
template <int kBits, class C, class Sink>
__device__ void hadamard(C* x, int bits, int length, const Sink& sink) {
  if constexpr (kBits == 0) {
    hadamard(x, bits, 0, bits, length, sink);
  } else {
#pragma unroll
    for (int stage = 0; stage < kBits; stage += 4) {
      if (stage) __syncthreads();
      hadamard_stages(x, kBits, stage, kBits, length, sink);
    }
  }
}

}  // namespace wx::gpu::sub
