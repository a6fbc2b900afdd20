// The dense update on the GPU, registered.
#include "device.h"
#include "update.cuh"

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CUDA, m) {
  m.impl("adadelta_", torch_adadelta::cuda::adadelta_<torch_adadelta::cuda::Device>);
}
