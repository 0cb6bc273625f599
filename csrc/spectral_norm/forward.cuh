// The forward kernels, and which of them serve a list.
#pragma once
#include <vector>

#include "finish.cuh"

namespace wx::gpu::sn {

template <class T, int N>
using ForwardTable = Table<Options, Forward<T>, N>;

// A tile's work of a phase. A weight that is one tile has no block to wait for: all its phases are done in the first.
template <class T>
__device__ void run(const Forward<T>& f, int phase, int index, const Options& o, const Chip& chip, int used) {
  const bool alone = f.cut.tiles() == 1;
  if (alone && phase > 0) return;
  const int last = alone ? product_phases(f) : phase;
  for (; phase <= last; phase++) {
    const Step step = step_of(f, phase);
    if (step.dots || step.sums)
      product(f, step, index, o, chip, used, phase > 0);
    else if (step.gather_t || step.gather_z)
      gather(f, step, index);
    else if (step.finish)
      finish(f, index, o, chip, used);
    __syncthreads();  // spare: sums at the end of a product order its writes as well; a phase without one would not
  }
}

template <class T>
__device__ int64_t tile_bytes(const Cut& cut, int index) {
  return static_cast<int64_t>(ceil_div(Tile(cut, index).lines(), cut.lines)) * batch_bytes<T>(cut);
}

// For which the compiler leaves registers: with fewer they would spill.
template <class T>
constexpr int kBlocksOfSM = sizeof(T) == 8 ? 1 : 2;

// A launch for each phase, a block for each tile. Blocks of the last phase go backwards: what was read last is still in
// the cache.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksOfSM<T>)
    forward_phase(const __grid_constant__ ForwardTable<T, N> table, int phase) {
  WX_DYNAMIC_SHARED(shared);
  const Options& o = table.common;
  const int item = phase == o.phases ? table.items - 1 - static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x);
  const Forward<T>& f = table.member_of(item);
  const bool keep = f.cut.tiles() == 1 && f.cut.one_batch();
  run(f, phase, item - f.first, o, Chip{shared + kTileBytes, shared, shared, keep ? o.stream_bytes : 0}, 0);
}

// One launch: every block keeps its tiles on chip from phase to phase, and the grid waits between phases.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksOfSM<T>)
    forward_resident(const __grid_constant__ ForwardTable<T, N> table) {
  WX_DYNAMIC_SHARED(shared);
  const Options& o = table.common;
  const Chip chip{shared, shared + o.acc_bytes, shared + o.acc_bytes + o.stream_bytes, o.kept_bytes};
  for (int phase = 0; phase <= o.phases; phase++) {
    int used = 0;
    for (int item = blockIdx.x; item < table.items; item += gridDim.x) {
      const Forward<T>& f = table.member_of(item);
      const int index = item - f.first;
      run(f, phase, index, o, chip, used);
      used = static_cast<int>(least(used + tile_bytes<T>(f.cut, index), 1 << 30));
    }
    if (phase < o.phases) grid_sync();
  }
}

enum class Path { kAuto, kPhases, kResident };

constexpr int kStaticBytes = 20 << 10;  // of shared memory, at the most

// Shared memory of a block of the resident kernel in a grid of `blocks`; kept_bytes = 0 if W does not fit.
template <class T>
void fit_on_chip(const std::vector<Forward<T>>& members, int blocks, int shared_bytes, bool forced, Options& o) {
  std::vector<int64_t> held(blocks);
  int64_t item = 0, most = 0;
  o.acc_bytes = o.stream_bytes = 0;
  for (const Forward<T>& f : members) {
    const int batch = f.cut.batch_bytes(sizeof(T));
    if (!f.cut.one_batch())
      o.acc_bytes = std::max(o.acc_bytes, static_cast<int>((f.cut.piece * sizeof(Compute<T>) + 15) / 16 * 16));
    o.stream_bytes = std::max(o.stream_bytes, batch);
    const int64_t tile = ceil_div<int64_t>(f.cut.rows * f.cut.slabs, f.cut.lines) * batch;
    for (int i = 0; i < f.cut.tiles(); i++, item++) most = std::max(most, held[item % blocks] += tile);
  }
  const bool fits = most + o.acc_bytes <= shared_bytes;
  if (fits) o.stream_bytes = 0;
  o.kept_bytes = fits ? static_cast<int>(most) : forced ? shared_bytes - o.acc_bytes - o.stream_bytes : 0;
}

template <class T, int N>
void launch_forward(const std::vector<Forward<T>>& members, const Options& options, Path path, cudaStream_t stream) {
  ForwardTable<T, N> table;
  table.common = options;
  Options& o = table.common;
  table.count = static_cast<int>(members.size());
  table.items = 0;
  o.phases = 0;
  int one = 0, many = 0, alone = 0;  // shared memory of a tile that is all of its weight, and of others
  for (int i = 0; i < table.count; i++) {
    Forward<T>& f = table.at[i] = members[i];
    f.first = table.items;
    table.items += f.cut.tiles();
    const int batch = f.cut.batch_bytes(sizeof(T));
    const int acc = f.cut.one_batch() ? 0 : static_cast<int>(f.cut.piece * sizeof(Compute<T>));
    many = std::max(many, acc ? kTileBytes + acc : batch);
    if (f.cut.tiles() == 1) {
      one = std::max(one, batch);
      alone++;
    } else {
      o.phases = std::max(o.phases, product_phases(f));
    }
  }
  const auto resident = forward_resident<T, N>;
  if (path != Path::kPhases && alone < table.count && cooperative_launch()) {
    const int most = max_shared_bytes() - kStaticBytes;
    for (const int bytes : {most / 2 - (2 << 10), most}) {  // two blocks on an SM, where they are enough
      const bool last = bytes == most;
      const int blocks = std::min(table.items, bytes > 0 ? resident_blocks(resident, kThreads, bytes) : 0);
      if (blocks <= 0) continue;
      fit_on_chip(members, blocks, bytes, path == Path::kResident && last, o);
      if (o.kept_bytes <= 0) continue;
      const int shared = o.acc_bytes + o.stream_bytes + o.kept_bytes;
      WX_LAUNCH_COOPERATIVE(resident, blocks, kThreads, shared, stream, table);
      return;
    }
  }
  const auto by_phase = forward_phase<T, N>;
  const int shared = std::max(one, many);
  o.stream_bytes = shared;
  o.acc_bytes = o.kept_bytes = 0;
  resident_blocks(by_phase, kThreads, shared);  // allows so much shared memory
  for (int phase = 0; phase <= o.phases; phase++)
    WX_LAUNCH_SHARED(by_phase, table.items, kThreads, phase == 0 || phase < o.phases ? shared : 0, stream, table,
                     phase);
}

// As many launches for the whole list as one weight needs, as long as it fits in the argument.
template <class T>
void launch_forward(const std::vector<Forward<T>>& members, const Options& options, Path path, cudaStream_t stream) {
  constexpr size_t kMost = kManyMembers<Options, Forward<T>>;
  static_assert(sizeof(ForwardTable<T, kMost>) <= kArgumentBytes - 4);
  if (members.size() <= kFewMembers) return launch_forward<T, kFewMembers>(members, options, path, stream);
  for (size_t i = 0; i < members.size(); i += kMost) {
    const auto end = members.begin() + std::min(i + kMost, members.size());
    launch_forward<T, kMost>({members.begin() + i, end}, options, path, stream);
  }
}

}  // namespace wx::gpu::sn
