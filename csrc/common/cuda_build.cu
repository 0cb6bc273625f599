// What this library was built for. weightxform/_load.py asks before the first CUDA tensor: a GPU or a driver that
// cannot run the kernels is found then, and not by a failed launch.
#ifndef WX_SIMT
#include <cuda_runtime.h>

#define WX_EXPORT extern "C" __attribute__((visibility("default")))
#define WX_TEXT(...) #__VA_ARGS__
#define WX_TEXT_OF(...) WX_TEXT(__VA_ARGS__)

namespace {

__global__ void nothing() {}  // compiled for the same architectures as every kernel here

}  // namespace

// The release of the CUDA runtime inside, 13000 for 13.0. A driver must be of its major version, or newer.
WX_EXPORT int weightxform_cuda_runtime() { return CUDART_VERSION; }

// The architectures in the fat binary, "800,900" for sm_80 and sm_90.
WX_EXPORT const char* weightxform_cuda_archs() { return WX_TEXT_OF(__CUDA_ARCH_LIST__); }

// 0 if this device and this driver can run the kernels, else the CUDA error. It makes a context on the device.
WX_EXPORT int weightxform_cuda_probe(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  cudaGetLastError();  // or the next launch would report it
  cudaSetDevice(before);
  return error;
}
#endif
