// The sums of squares on the GPU, registered.
#include "device.h"
#include "square_sums.cuh"

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CUDA, m) {
  m.impl("grad_square_sums", torch_adadelta::cuda::grad_square_sums<torch_adadelta::cuda::Device>);
}
