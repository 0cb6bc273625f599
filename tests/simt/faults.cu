// Kernels with planted faults, each named on the command line, and correct ones: what simt.h and the sanitizers must
// report, and what they must not. Exit status 3: the results show the fault.
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

// --- barriers that some thread does not reach ------------------------------------------------------------------------

__global__ void divergent(float* out) {  // the first warp waits at the barrier, the second in a shuffle
  float x = 1;
  if (threadIdx.x < 32 || threadIdx.x == 40) {
    __syncthreads();
  } else {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  }
  out[threadIdx.x] = x;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void part_of_a_warp(float* out) {
  float x = 1;
  if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  out[threadIdx.x] = x;
  __syncthreads();
}

__global__ void not_in_the_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void part_of_a_block(float* out) {
  if (threadIdx.x < 32) wx::gpu::grid_sync();
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void part_of_the_grid(float* out) {
  if (blockIdx.x != 1) wx::gpu::grid_sync();
  out[threadIdx.x] = 1;
}

// --- memory
// ------------------------------------------------------------------------------------------------------------

__global__ void past_the_end(float* out, int n) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (i <= n) out[i] = 1;
}

__global__ void past_the_shared_memory(float* out) {
  WX_DYNAMIC_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void never_written(float* out) {  // dynamic and static shared memory
  WX_DYNAMIC_SHARED(raw);
  __shared__ float fixed[64];
  if (threadIdx.x < 32) fixed[threadIdx.x] = reinterpret_cast<float*>(raw)[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(raw)[threadIdx.x];
  out[64 + threadIdx.x] = fixed[threadIdx.x];
}

// --- races
// -------------------------------------------------------------------------------------------------------------

template <bool kBarrier>
__global__ void turn_around(float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
  __syncthreads();
}

__global__ void shuffle_is_no_barrier(float* out) {
  __shared__ float shared[32];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  const float x = __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  out[threadIdx.x] = shared[31 - threadIdx.x] + x;
}

__global__ void syncwarp_is_one(float* out) {
  __shared__ float shared[32];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

template <bool kGridSync>
__global__ void next_blocks(float* parts, float* out) {  // what another block wrote
  if (threadIdx.x == 0) parts[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
  if (kGridSync) {
    wx::gpu::grid_sync();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = parts[(blockIdx.x + 1) % gridDim.x];
}

__global__ void all_write_one(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

__global__ void last_block_sums(int* counter, float* parts, float* out) {  // correct: the counter orders
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = 1;
    __threadfence();
    last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0)
    for (unsigned b = 0; b < gridDim.x; b++) *out += parts[b];
}

int run(const char* name) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  cudaStream_t stream = nullptr;
  std::vector<float> parts(8), out(256, -1.0f), other(256, -1.0f);
  float* o = out.data();
  if (is("divergent")) WX_LAUNCH(divergent, 1, 64, stream, o);
  if (is("two_barriers")) WX_LAUNCH(two_barriers, 1, 64, stream, o);
  if (is("part_of_a_warp")) WX_LAUNCH(part_of_a_warp, 1, 64, stream, o);
  if (is("not_in_the_mask")) WX_LAUNCH(not_in_the_mask, 1, 64, stream, o);
  if (is("part_of_a_block")) WX_LAUNCH_COOPERATIVE(part_of_a_block, 2, 64, 0, stream, o);
  if (is("part_of_the_grid")) WX_LAUNCH_COOPERATIVE(part_of_the_grid, 3, 32, 0, stream, o);
  if (is("not_cooperative")) WX_LAUNCH(next_blocks<true>, 2, 32, stream, parts.data(), o);
  if (is("too_many_blocks")) {
    const int fit = wx::gpu::resident_blocks(next_blocks<true>, 32, 40 << 10);
    WX_LAUNCH_COOPERATIVE(next_blocks<true>, fit + 1, 32, 40 << 10, stream, parts.data(), o);
  }
  if (is("too_much_shared_memory")) WX_LAUNCH_SHARED(never_written, 1, 64, wx::gpu::max_shared_bytes() + 1, stream, o);
  if (is("shared_memory_unasked")) WX_LAUNCH_SHARED(never_written, 1, 64, 50 << 10, stream, o);
  if (is("no_blocks")) WX_LAUNCH(divergent, 0, 64, stream, o);
  if (is("past_the_end")) {
    std::unique_ptr<float[]> exact(new float[60]);
    WX_LAUNCH(past_the_end, 1, 64, stream, exact.get(), 60);
  }
  if (is("past_the_shared_memory")) WX_LAUNCH_SHARED(past_the_shared_memory, 1, 64, 64 * sizeof(float), stream, o);
  if (is("never_written")) {
    for (int launch = 0; launch < 2; launch++)  // and nothing is left from the launch before
      WX_LAUNCH_SHARED(never_written, 1, 64, 64 * sizeof(float), stream, o);
    for (int i = 0; i < 128; i++)
      if (std::isnan(out[i]) != (i % 64 >= 32)) return 1;
    return 3;
  }
  if (is("missing_barrier")) {
    WX_LAUNCH(turn_around<false>, 1, 64, stream, o);
    simt_order(1);
    WX_LAUNCH(turn_around<false>, 1, 64, stream, other.data());
    return out == other ? 0 : 3;
  }
  if (is("missing_grid_sync")) {
    WX_LAUNCH_COOPERATIVE(next_blocks<false>, 3, 32, 0, stream, parts.data(), o);
    simt_order(1);
    std::fill(parts.begin(), parts.end(), 0.0f);
    WX_LAUNCH_COOPERATIVE(next_blocks<false>, 3, 32, 0, stream, parts.data(), other.data());
    return out == other ? 0 : 3;
  }
  if (is("shuffle_is_no_barrier")) WX_LAUNCH(shuffle_is_no_barrier, 1, 32, stream, o);
  if (is("all_write_one")) WX_LAUNCH(all_write_one, 3, 32, stream, o);
  if (is("correct")) {
    int counter = 0;
    out.back() = 0;
    for (int order = 0; order < 3; order++) {
      simt_order(order);
      WX_LAUNCH(turn_around<true>, 1, 64, stream, other.data());
      WX_LAUNCH(syncwarp_is_one, 1, 32, stream, o);
      WX_LAUNCH_COOPERATIVE(next_blocks<true>, 3, 32, 0, stream, parts.data(), o);
      counter = 0;
      WX_LAUNCH(last_block_sums, 5, 32, stream, &counter, parts.data(), &out.back());
    }
    return out.back() == 15 && out[0] == 2 && out[95] == 1 ? 0 : 3;
  }
  return 0;
}

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& e) {  // what a launch refuses, before it runs
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
