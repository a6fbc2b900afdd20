// The ops of csrc/cuda on the devices of fake_cuda.cpp, launched as in the library.
#include <cuda_runtime.h>  // that of the emulator, before what includes another

#include "../../../csrc/cuda/device.h"
#include "../../../csrc/cuda/sparse.cuh"
#include "../../../csrc/cuda/square_sums.cuh"
#include "../../../csrc/cuda/update.cuh"

extern "C" int fake_cuda_current_device();

// What only a PyTorch with CUDA has.
extern "C" __attribute__((visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = emulator::stream_of(device);
  return AOTI_TORCH_SUCCESS;
}

namespace {

using torch_adadelta::cuda::Device;

int64_t launches() { return emulator::launches; }

// What every launch returns after `before` more.
int64_t fail_launches(int64_t error, int64_t before) {
  emulator::launches_before_error = before;
  emulator::next_error = static_cast<cudaError_t>(error);
  return cudaGetLastError();
}

void set_stream(int64_t number) { emulator::current_stream = static_cast<int>(number); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CUDA, m) {
  emulator::current_device = fake_cuda_current_device;
  m.impl("adadelta_", torch_adadelta::cuda::adadelta_<Device>);
  m.impl("grad_square_sums", torch_adadelta::cuda::grad_square_sums<Device>);
  m.impl("sparse_adadelta_", torch_adadelta::cuda::sparse_adadelta_<Device>);
  m.impl("first_invalid_indices", torch_adadelta::cuda::first_invalid_indices<Device>);
}

STABLE_TORCH_LIBRARY(fake_cuda_ops, m) {
  m.def("launches() -> int");
  m.def("fail_launches(int error, int before=0) -> int");
  m.def("set_stream(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fake_cuda_ops, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("fail_launches", TORCH_BOX(&fail_launches));
  m.impl("set_stream", TORCH_BOX(&set_stream));
}
