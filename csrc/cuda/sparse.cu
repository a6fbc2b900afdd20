// The update by sparse gradients on the GPU, registered.
#include "device.h"
#include "sparse.cuh"

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CUDA, m) {
  m.impl("sparse_adadelta_", torch_adadelta::cuda::sparse_adadelta_<torch_adadelta::cuda::Device>);
  m.impl("first_invalid_indices", torch_adadelta::cuda::first_invalid_indices<torch_adadelta::cuda::Device>);
}
