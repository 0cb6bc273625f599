// The products t = W x and z = W'y of a tile, from shared memory.
#pragma once
#include "lengths.cuh"

namespace wx::gpu::sn {

constexpr int kChunk = 1024;                                 // numbers of a line that one warp adds up
constexpr int kLongLines = kOneBytes / 2 / kChunk * 2 + 16;  // chunks of the lines that are longer, at the most

// Shared memory of a block, beside what the helpers of device.cuh have.
template <class C>
struct Scratch {
  C line[kMaxLines];  // a number for each line of the batch, then for each row
  C part[kLongLines];
  C sum[kThreads];
};

struct Chip {
  unsigned char *acc, *stream, *kept;
  int kept_bytes;

  // Batch k, of `bytes`, of a tile whose first batch would be at `used`; null if it does not stay on chip.
  __device__ unsigned char* place(int used, int k, int bytes) const {
    const int64_t at = used + static_cast<int64_t>(k) * bytes;
    return at + bytes <= kept_bytes ? kept + at : nullptr;
  }
};

template <class T>
__device__ int batch_bytes(const Cut& c) {
  return static_cast<int>((least(c.lines, c.rows * c.slabs) * c.piece * sizeof(T) + 15) / 16 * 16);
}

// n lines of W into shared memory, side by side.
template <class T>
__device__ void load_lines(T* shared, const T* w, int n, int columns, int64_t stride) {
  if (columns == stride) return copy_async<kThreads>(shared, w, n * columns);
  for (int i = 0; i < n; i++) copy_async<kThreads>(shared + i * columns, w + i * stride, columns);
}

// scratch.line[l] = line l times its part of x; the lines of slab s begin at x[s columns]. A warp takes four lines, or
// four groups of them where they are short. Ends with a barrier.
template <class T>
__device__ void dots(const T* w, int lines, int rows, int columns, const Vector<Compute<T>>& x,
                     Scratch<Compute<T>>& scratch) {
  using C = Compute<T>;
  int width = 32;  // lanes on a line
  while (width > 1 && width / 2 >= columns) width /= 2;
  const int lane = threadIdx.x % 32, in_line = lane % width, groups = 32 / width;
  const int chunks = ceil_div(columns, kChunk), units = ceil_div(lines, 4 * groups) * chunks;
  for (int unit = threadIdx.x / 32; unit < units; unit += kWarps) {
    const int chunk = unit % chunks, first = unit / chunks * 4 * groups + lane / width;
    const int end = min(columns, (chunk + 1) * kChunk);
    int at[4], slab[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int line = min(first + k * groups, lines - 1);
      at[k] = line * columns;
      slab[k] = lines == rows ? 0 : line / rows * columns;
    }
    C sum[4] = {};
    if (lines == rows) {
#pragma unroll 2
      for (int j = chunk * kChunk + in_line; j < end; j += width) {
        const C number = x[j];
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += widen(w[at[k] + j]) * number;
      }
    } else {
#pragma unroll 1
      for (int j = chunk * kChunk + in_line; j < end; j += width)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += widen(w[at[k] + j]) * x[slab[k] + j];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      for (int offset = 16; offset; offset /= 2) {
        const C other = __shfl_xor_sync(0xffffffffu, sum[k], offset);
        if (offset < width) sum[k] += other;
      }
      const int line = first + k * groups;
      if (in_line == 0 && line < lines)
        (chunks == 1 ? scratch.line[line] : scratch.part[line * chunks + chunk]) = sum[k];
    }
  }
  __syncthreads();
  if (chunks == 1) return;
  for (int line = threadIdx.x; line < lines; line += kThreads) {
    C sum = scratch.part[line * chunks];
    for (int k = 1; k < chunks; k++) sum += scratch.part[line * chunks + k];
    scratch.line[line] = sum;
  }
  __syncthreads();
}

// emit(c, sum of W[r, c] scratch.line[r]) for each column of the slabs in the batch; a column is always the same
// thread's. Columns that are fewer than threads are shared by several.
template <class T, class F>
__device__ void sums(const T* w, int slabs, int rows, int columns, Scratch<Compute<T>>& scratch, const F& emit) {
  using C = Compute<T>;
  const int all = slabs * columns;
  int width = kThreads;  // threads side by side
  while (width > 1 && width / 2 >= all) width /= 2;
  const int group = threadIdx.x / width, groups = kThreads / width;
  for (int begin = 0; begin < all; begin += width) {
    const int c = begin + static_cast<int>(threadIdx.x) % width;
    C sum[4] = {};
    if (c < all) {
      const int slab = slabs == 1 ? 0 : c / columns;
      const T* at = w + slab * rows * columns + (c - slab * columns);
      int r = group;
#pragma unroll 1
      for (; r + 3 * groups < rows; r += 4 * groups) {
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += scratch.line[r + k * groups] * widen(at[(r + k * groups) * columns]);
      }
#pragma unroll 1
      for (; r < rows; r += groups) sum[0] += scratch.line[r] * widen(at[r * columns]);
    }
    C value = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (groups > 1) {
      scratch.sum[threadIdx.x] = value;
      __syncthreads();
      if (group == 0)  // once: all columns are in one turn, and the batch ends with a barrier
        for (int g = 1; g < groups; g++) value += scratch.sum[g * width + threadIdx.x];
    }
    if (group == 0 && c < all) emit(c, value);
  }
}

// What a block knows of its tile. In shared memory, where it takes nobody's registers.
template <class C>
struct Job {
  Vector<C> x, y;
  C *t, *z;  // where the products go to
  int64_t offset;
  int lines, columns, slabs;
};

template <class T>
__device__ void set_up(Job<Compute<T>>& job, const Forward<T>& f, const Step& step, int index, double t, double z) {
  using C = Compute<T>;
  const Cut& cut = f.cut;
  const Work<C> work(f.work, cut);
  const Tile tile(cut, index);
  const bool given = step.iteration == 0 && !step.second;
  job.x = given ? turned(f.x0, f.inner, cut.columns(), tile.column)
                : Vector<C>{work.z + tile.column, static_cast<C>(z), 0, 0, 0};
  job.y = {(given ? f.y0 : work.t) + tile.row, static_cast<C>(given ? 1 : t), 0, 0, 0};
  job.t = work.t_part + static_cast<int64_t>(tile.t_part) * cut.m + tile.row;
  job.z = work.z_part + static_cast<int64_t>(tile.z_part) * cut.columns() + tile.column;
  job.offset = tile.offset;
  job.lines = tile.lines();
  job.columns = tile.columns;
  job.slabs = static_cast<int>(tile.slabs);
}

template <class T>
__device__ void product(const Forward<T>& f, const Step& step, int index, const Options& o, const Chip& chip, int used,
                        bool loaded) {
  using C = Compute<T>;
  __shared__ Scratch<C> scratch;
  __shared__ Job<C> job;
  const Cut& cut = f.cut;
  const bool both = step.dots && step.sums;
  {
    Lengths lengths;
    if (step.second || step.iteration > 0)
      lengths = Lengths(f, Work<C>(f.work, cut), step.iteration - !step.second, o.eps, step.second);
    if (threadIdx.x == 0) set_up(job, f, step, index, lengths.t, lengths.z);
    __syncthreads();
  }
  double t2 = 0, z2 = 0;
  int exponent = kNoExponent;  // the product that comes second is of the first divided by 2 to this

  for (int first = 0, k = 0; first < job.lines; first += cut.lines, k++) {
    const int lines = min(cut.lines, job.lines - first), rows = lines / job.slabs;
    const bool last = first + lines == job.lines;
    unsigned char* place = chip.place(used, k, batch_bytes<T>(cut));
    T* const w = reinterpret_cast<T*>(place ? place : chip.stream);
    if (!place || !loaded) load_lines(w, f.w + job.offset + first * cut.b, lines, job.columns, cut.b);
    if (step.sums && (f.x_first || !both))
      for (int r = threadIdx.x; r < rows; r += kThreads) scratch.line[r] = job.y[first + r];
    __syncthreads();

    C rescale = 1;  // of the sums of the batches before
#pragma unroll 1
    for (int turn = 0; turn < (both ? 2 : 1); turn++) {
      double largest = 0;
      if (both ? f.x_first == (turn == 1) : step.dots) {
        dots(w, lines, rows, job.columns, job.x, scratch);
        for (int r = threadIdx.x; r < rows; r += kThreads) {
          C value = scratch.line[r];
          for (int s = 1; s < job.slabs; s++) value += scratch.line[s * rows + r];
          scratch.line[r] = value;  // no other thread reads or writes it
          job.t[first + r] = value;
          t2 += static_cast<double>(value) * static_cast<double>(f.n_iter ? value : job.y.p[first + r]);
          largest = fmax(largest, fabs(static_cast<double>(value)));
        }
      } else {
        sums(w, job.slabs, rows, job.columns, scratch, [&](int c, C value) {
          C* const acc = reinterpret_cast<C*>(chip.acc);
          if (first > 0) value += rescale * acc[c];
          if (!last) {
            acc[c] = value;
            return;
          }
          job.z[c] = value;
          z2 += static_cast<double>(value) * static_cast<double>(value);
          largest = fmax(largest, fabs(static_cast<double>(value)));
        });
      }
      if (!both || turn == 1) break;
      const int now = exponent_of<C>(block_max<kThreads>(largest));  // its barriers show z to the block
      if (exponent == kNoExponent) {
        exponent = now == kNoExponent || abs(now) > kSafeExponent ? now : 0;
      } else if (now > exponent + kSafeExponent) {
        rescale = power_of_two<C>(exponent - now);
        exponent = now;
      }
      const C down = power_of_two<C>(exponent == kNoExponent ? 0 : -exponent);
      if (f.x_first) {
        if (threadIdx.x == 0) job.x = {job.z, down, 0, 0, 0};
        __syncthreads();
      } else {
        for (int r = threadIdx.x; r < rows; r += kThreads) scratch.line[r] *= down;
        __syncthreads();
      }
    }
    __syncthreads();  // the next batch comes into the same place
  }
  const Work<C> work(f.work, cut);
  const int64_t slot = step.iteration % 2 * cut.tiles() + index;
  if (step.dots && cut.t_parts() == 1) {
    t2 = block_sum<kThreads>(t2);
    if (threadIdx.x == 0) work.t2[slot] = t2;
  }
  if (step.sums && cut.z_parts() == 1) {
    z2 = block_sum<kThreads>(z2);
    if (threadIdx.x == 0) work.z2[slot] = z2;
  }
  if (both && threadIdx.x == 0) {
    work.exponents[index] = exponent;
    if (cut.tiles() == 1) *work.exponent = exponent;
  }
}

}  // namespace wx::gpu::sn
