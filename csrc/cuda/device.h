// The GPU that the kernels run on.
#pragma once

#include "../tensor_lists.h"

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <cstdint>

namespace torch_adadelta::cuda {

#define ADADELTA_STRING(...) #__VA_ARGS__
#define ADADELTA_EXPANDED_STRING(...) ADADELTA_STRING(__VA_ARGS__)

// Current from its construction to its destruction. Launches go to the stream that PyTorch has made current.
class Device {
 public:
  static int32_t type() { return aoti_torch_device_type_cuda(); }

  explicit Device(int32_t index) : index_(index), guard_(index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename Parameters>
  void launch(void (*kernel)(Parameters), int64_t blocks, int threads, const Parameters& parameters) const {
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    const cudaError_t error = cudaLaunchKernel(
        reinterpret_cast<const void*>(kernel), static_cast<unsigned>(blocks), threads, arguments, 0, stream_
    );
    if (error != cudaSuccess) {
      cudaGetLastError();  // so that nobody else finds it
      fail_launch(error);
    }
  }

 private:
  [[noreturn]] void fail_launch(cudaError_t error) const {
    if (error != cudaErrorNoKernelImageForDevice) {
      fail("CUDA error: ", cudaGetErrorString(error));
    }
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_);
    fail(
        "torch_adadelta was not compiled for the compute capability of this GPU, ",
        major * 100 + minor * 10,
        ", but for ",
        ADADELTA_EXPANDED_STRING(__CUDA_ARCH_LIST__)
    );
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace torch_adadelta::cuda
