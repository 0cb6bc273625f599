// The torch side of a CUDA op: device guard, current stream, launch check, registration.
#pragma once
#include "checks.h"

#ifndef WX_SIMT

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

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
