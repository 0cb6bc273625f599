// One source for host and device, in headers that include nothing of CUDA.
#pragma once

#if defined(__CUDACC__) || defined(WX_SIMT)
#define WX_HOST_DEVICE __host__ __device__
#else
#define WX_HOST_DEVICE
#endif
