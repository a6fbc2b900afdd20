// As much of the CUDA runtime as csrc/cuda/device.h calls: a launch runs the kernel at once, or fails as it was told
// to.
#pragma once

#include "emulator.h"

#define CUDART_VERSION 12010
#define __CUDA_ARCH_LIST__ 750, 800, 1200

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
};

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

struct cudaStream;
using cudaStream_t = cudaStream*;

struct dim3 {
  unsigned x;
  dim3(unsigned x_) : x(x_) {}
};

namespace emulator {

inline cudaError_t next_error = cudaSuccess;  // of a launch
inline int64_t launches_before_error = 0;     // which succeed
inline cudaError_t last_error = cudaSuccess;  // which cudaGetLastError has not seen
inline int (*current_device)() = nullptr;

inline int current_stream = 0;  // on every device: the default one, or another number

// A stream has the address that its device's index and its number give it.
inline cudaStream_t stream_of(int device) {
  return reinterpret_cast<cudaStream_t>(16 * (device + 1) + 1024 * current_stream);
}

}  // namespace emulator

// A kernel takes the address of its parameters, for a reference is one to the machine.
inline cudaError_t cudaLaunchKernel(
    const void* kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared_bytes, cudaStream_t stream
) {
  if (blocks.x == 0 || blocks.x > 2147483647u || threads.x > 1024 || shared_bytes != 0 ||
      stream != emulator::stream_of(emulator::current_device())) {
    return emulator::last_error = cudaErrorInvalidValue;
  }
  if (emulator::next_error != cudaSuccess && emulator::launches_before_error-- <= 0) {
    return emulator::last_error = emulator::next_error;
  }
  const void* parameters = arguments[0];
  using Kernel = void (*)(const void*);
  emulator::launch(reinterpret_cast<Kernel>(const_cast<void*>(kernel)), blocks.x, threads.x, parameters);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "some other error";
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 6 : device;
  return cudaSuccess;
}
