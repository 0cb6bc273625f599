// The torch side of a CUDA op: device guard, current stream, launch check, registration.
#pragma once
#include "checks.h"

#ifndef WX_SIMT

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

// Absent from a CPU-only libtorch. Weak: _cuda loads there too, and its registrations can be checked without a GPU.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool,
                                                              char**);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);
}

#define WX_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(weightxform, CUDA, m)

namespace wx::gpu {

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// Makes the device of a tensor current for its lifetime.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launches() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

// What the current device has. The driver is asked once for each device.

inline int current_device() {
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess, "weightxform: no current CUDA device");
  return device;
}

inline int device_attribute(cudaDeviceAttr what) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, fresh] = known.try_emplace({device, static_cast<int>(what)}, 0);
  if (fresh) STD_CUDA_CHECK(cudaDeviceGetAttribute(&at->second, what, device));
  return at->second;
}

inline int sm_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline bool cooperative_launch() { return device_attribute(cudaDevAttrCooperativeLaunch) != 0; }

// How many blocks of a kernel the device holds at once: 0 if it cannot run one. It lets the kernel have as much dynamic
// shared memory as there is beside its static one.
template <class K>
int resident_blocks(K kernel, int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<K, int, int, int>, int> known;
  const int device = current_device(), sms = sm_count(), most = max_shared_bytes();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, fresh] = known.try_emplace({kernel, device, threads, shared_bytes}, 0);
  if (fresh) {
    cudaFuncAttributes attributes;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic));
    int blocks = 0;
    if (shared_bytes <= dynamic)
      STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    at->second = blocks * sms;
  }
  return at->second;
}

}  // namespace wx::gpu

#else  // tests/simt: the ops of a second namespace, on CPU tensors

#define WX_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(weightxform_simt, CPU, m)

namespace wx::gpu {

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline void check_launches() {}

}  // namespace wx::gpu

#endif
