// What kernels know of a weight, and its workspace.
#pragma once
#include "cut.cuh"

namespace wx::gpu::sn {

// Shared by all members of a call.
struct Options {
  double eps;
  double bound;
  bool bounded;
  Format out;
  int phases;        // of the longest member
  int acc_bytes;     // shared memory of a block: sums of z,
  int stream_bytes;  // one batch that does not stay,
  int kept_bytes;    // and batches that stay
};

template <class T>
struct Forward {
  using C = Compute<T>;

  const T* w;
  void* out;         // none: only the state is wanted
  const C *y0, *x0;  // unit vectors, as they came in: y of the rows of W, x of its columns
  C *y, *x, *sigma;  // where they go to
  const C* gain;
  unsigned char* work;
  Cut cut;
  int64_t inner;  // x0 and x are [inner, columns / inner] where the columns of W are the transpose; 0: as they are
  int n_iter;
  bool x_first;
  int first;
};

// The words are those of reference.py, with y, x for u, v or v, u: t = W x, z = W'y, before they have unit length.
// Squares of two iterations, since a block may be an iteration ahead of one that still reads.
template <class C>
struct Work {
  double *t2, *z2;     // [2][tiles]: partial sums of |t|^2 and |z|^2
  int* exponents;      // [tiles]: the second product of a tile was divided by 2 to this
  int* exponent;       // the same of the sum
  C *t, *z;            // [m], [columns]
  C *t_part, *z_part;  // [t_parts, m], [z_parts, columns]; t and z where there is one part

  __host__ __device__ Work(unsigned char* base, const Cut& c) {
    const int64_t tiles = c.tiles();
    t2 = reinterpret_cast<double*>(base);
    z2 = t2 + 2 * tiles;
    exponents = reinterpret_cast<int*>(z2 + 2 * tiles);
    exponent = exponents + tiles;
    t = reinterpret_cast<C*>(reinterpret_cast<double*>(exponents) + ceil_div<int64_t>(tiles + 1, 2));
    z = t + c.m;
    t_part = c.t_parts() > 1 ? z + c.columns() : t;
    z_part = c.z_parts() > 1 ? z + c.columns() + (c.t_parts() > 1 ? c.t_parts() * c.m : 0) : z;
  }
  __host__ static int64_t bytes(const Cut& c) {
    const int64_t tiles = c.tiles();
    int64_t numbers = c.m + c.columns();
    if (c.t_parts() > 1) numbers += c.t_parts() * c.m;
    if (c.z_parts() > 1) numbers += c.z_parts() * c.columns();
    return ((4 * tiles + (tiles + 2) / 2) * 8 + numbers * static_cast<int64_t>(sizeof(C)) + 15) / 16 * 16;
  }
};

// What a member does in a phase.
struct Step {
  bool dots = false, sums = false;          // products: t = W x, z = W'y
  bool gather_t = false, gather_z = false;  // partial sums become t, z
  bool finish = false;                      // state and out
  int iteration = 0;
  bool second = false;  // a product of the other vector of this iteration, not of the last one's
};

// Phases before the last one.
template <class T>
__host__ __device__ int product_phases(const Forward<T>& f) {
  const int more_t = f.cut.t_parts() > 1, more_z = f.cut.z_parts() > 1;
  if (f.n_iter == 0) return 1 + more_t;
  return f.n_iter * (f.cut.fused(f.x_first) ? 1 + (f.x_first ? more_t : more_z) : 2 + more_t + more_z);
}

template <class T>
__device__ Step step_of(const Forward<T>& f, int phase) {
  const int phases = product_phases(f);
  Step s;
  s.finish = phase == phases;
  if (phase >= phases) return s;
  if (f.n_iter == 0) {
    (phase == 0 ? s.dots : s.gather_t) = true;
    return s;
  }
  const int per = phases / f.n_iter;
  int k = phase % per;
  s.iteration = phase / per;
  if (f.cut.fused(f.x_first)) {
    if (k == 0)
      s.dots = s.sums = true;
    else
      (f.x_first ? s.gather_t : s.gather_z) = true;
    return s;
  }
  const bool more_first = (f.x_first ? f.cut.z_parts() : f.cut.t_parts()) > 1;
  if (k == 0) {
    (f.x_first ? s.sums : s.dots) = true;
  } else if (k == 1 && more_first) {
    (f.x_first ? s.gather_z : s.gather_t) = true;
  } else if (k == 1 + more_first) {
    (f.x_first ? s.dots : s.sums) = true;
    s.second = true;
  } else {
    (f.x_first ? s.gather_t : s.gather_z) = true;
  }
  return s;
}

}  // namespace wx::gpu::sn
