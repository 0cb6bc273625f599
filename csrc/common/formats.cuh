// Numbers in memory whose dtype is known when a kernel runs.
#pragma once
#include "device.cuh"

namespace wx::gpu {

template <class C>  // float or double
constexpr Format kFormatOf = sizeof(C) == 8 ? Format::kDouble : Format::kFloat;

template <class C>
__device__ C load(const void* from, Format format, int64_t i) {
  switch (format) {
    case Format::kFloat:
      return static_cast<C>(static_cast<const float*>(from)[i]);
    case Format::kDouble:
      return static_cast<C>(static_cast<const double*>(from)[i]);
    case Format::kHalf:
      return static_cast<C>(widen(static_cast<const fp16*>(from)[i]));
    default:
      return static_cast<C>(widen(static_cast<const bf16*>(from)[i]));
  }
}

template <class C>
__device__ void store(void* to, Format format, int64_t i, C value) {
  switch (format) {
    case Format::kFloat:
      return narrow(value, static_cast<float*>(to)[i]);
    case Format::kDouble:
      return narrow(value, static_cast<double*>(to)[i]);
    case Format::kHalf:
      return narrow(value, static_cast<fp16*>(to)[i]);
    default:
      return narrow(value, static_cast<bf16*>(to)[i]);
  }
}

struct Input {
  const void* data;
  Format format;

  // f(pointer of the right type): a loop inside has no branch for each number.
  template <class F>
  __device__ void read(const F& f) const {
    if (format == Format::kFloat)
      f(static_cast<const float*>(data));
    else if (format == Format::kBfloat)
      f(static_cast<const bf16*>(data));
    else if (format == Format::kHalf)
      f(static_cast<const fp16*>(data));
    else
      f(static_cast<const double*>(data));
  }
};

struct Output {
  void* data;
  Format format;

  template <class F>
  __device__ void write(const F& f) const {
    if (format == Format::kFloat)
      f(static_cast<float*>(data));
    else if (format == Format::kBfloat)
      f(static_cast<bf16*>(data));
    else if (format == Format::kHalf)
      f(static_cast<fp16*>(data));
    else
      f(static_cast<double*>(data));
  }
};

}  // namespace wx::gpu
