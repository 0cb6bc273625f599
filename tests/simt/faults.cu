// Kernels with planted faults: what simt.h and the sanitizers must report.
#include <cstring>
#include <memory>
#include <vector>

__global__ void divergent(
    float* out) {  // the first warp waits at the barrier, the second in a shuffle, neither gets on
  float x = 1;
  if (threadIdx.x < 32 || threadIdx.x == 40) {
    __syncthreads();
  } else {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  }
  out[threadIdx.x] = x;
}

__global__ void part_of_a_warp(float* out) {
  float x = 1;
  if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  out[threadIdx.x] = x;
  __syncthreads();
}

__global__ void past_the_end(float* out, int n) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (i <= n) out[i] = 1;
}

__global__ void order_matters(float* out) {  // the barrier between write and read is missing
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];
  __syncthreads();
}

int main(int argc, char** argv) {
  const char* fault = argc > 1 ? argv[1] : "";
  cudaStream_t stream = nullptr;
  std::vector<float> out(64, -1.0f);
  if (!std::strcmp(fault, "divergent")) WX_LAUNCH(divergent, 1, 64, stream, out.data());
  if (!std::strcmp(fault, "part_of_a_warp")) WX_LAUNCH(part_of_a_warp, 1, 64, stream, out.data());
  if (!std::strcmp(fault, "past_the_end")) {
    std::unique_ptr<float[]> exact(new float[60]);
    WX_LAUNCH(past_the_end, 1, 64, stream, exact.get(), 60);
  }
  if (!std::strcmp(fault, "order_matters")) {
    std::vector<float> other(64, -1.0f);
    WX_LAUNCH(order_matters, 1, 64, stream, out.data());
    simt_order(1);
    WX_LAUNCH(order_matters, 1, 64, stream, other.data());
    return out == other ? 0 : 3;
  }
  return 0;
}
