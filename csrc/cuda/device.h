// The GPU that the kernels run on.
#pragma once

#include "../tensor_lists.h"

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <type_traits>

// With an older compiler or driver a kernel's parameters, in which a launch has its table, take up 4 KB at most.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
#error "torch_adadelta needs CUDA 12.1 or later"
#endif

namespace torch_adadelta::cuda {

#define ADADELTA_STRING(...) #__VA_ARGS__
#define ADADELTA_EXPANDED_STRING(...) ADADELTA_STRING(__VA_ARGS__)

// "750,800": what this was compiled for, in one piece for who looks into the library.
__attribute__((used)) static const char kArchitectures[] = ADADELTA_EXPANDED_STRING(__CUDA_ARCH_LIST__);

// Current from its construction to its destruction. Launches go to the stream that PyTorch has made current.
class Device {
 public:
  static int32_t type() { return aoti_torch_device_type_cuda(); }

  explicit Device(int32_t index) : index_(index), guard_(index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename Kernel, typename Parameters>
  void launch(Kernel* kernel, int64_t blocks, int threads, const Parameters& parameters) const {
    static_assert(std::is_invocable_v<Kernel, const Parameters&>);
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    const cudaError_t error = cudaLaunchKernel(
        reinterpret_cast<const void*>(kernel), static_cast<unsigned>(blocks), threads, arguments, 0, stream_
    );
    if (error != cudaSuccess) {
      cudaGetLastError();  // so that nobody else finds it
      // If it is the first one, nothing was written.
      has_launched_ ? fail(describe(error)) : refuse_call(describe(error));
    }
    has_launched_ = true;
  }

 private:
  std::string describe(cudaError_t error) const {
    std::ostringstream text;
    if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
      text << "CUDA error: " << cudaGetErrorString(error);
      return text.str();
    }
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_);
    text << "torch_adadelta was compiled for ";
    std::istringstream list(kArchitectures);
    for (std::string number; std::getline(list, number, ',');) {
      text << "sm_" << std::stoi(number) / 10 << ", ";
    }
    text << "not for this GPU, an sm_" << major << minor << ". Install it again with TORCH_CUDA_ARCH_LIST=" << major
         << '.' << minor << " in the environment";
    return text.str();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  mutable bool has_launched_ = false;
};

}  // namespace torch_adadelta::cuda
