// The ops of csrc/cuda for CPU tensors, as torch_adadelta_emulated: the same kernels and launches, without a GPU.
#include "emulator.h"

#include "../../csrc/cuda/square_sums.cuh"
#include "../../csrc/cuda/update.cuh"

namespace {

struct EmulatedDevice {
  static int32_t type() { return aoti_torch_device_type_cpu(); }

  explicit EmulatedDevice(int32_t) {}

  template <typename Parameters>
  void launch(void (*kernel)(const Parameters&), int64_t blocks, unsigned threads, const Parameters& parameters) const {
    emulator::launch(kernel, blocks, threads, parameters);
  }
};

int64_t launches() { return emulator::launches; }

int64_t set_seed(int64_t seed) {
  emulator::seed = static_cast<unsigned>(seed);
  return seed;
}

int64_t set_edge_blocks(int64_t count) {
  emulator::edge_blocks = count;
  return count;
}

int64_t small_table() { return torch_adadelta::cuda::kSmallTable; }

int64_t large_table() { return torch_adadelta::cuda::kLargeTable; }

int64_t chunk() { return torch_adadelta::cuda::kChunk; }

}  // namespace

STABLE_TORCH_LIBRARY(torch_adadelta_emulated, m) {
  m.def(
      "adadelta_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] acc_deltas, "
      "float lr, float rho, float epsilon, bool maximize=False, "
      "Tensor? lr_tensor=None, Tensor? rho_tensor=None, Tensor? epsilon_tensor=None, "
      "float? clipvalue=None, float? clipnorm=None, Tensor? square_sums=None, "
      "float factor=1.0, Tensor? factor_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
  );
  m.def(
      "adadelta_.unclipped(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] acc_deltas, "
      "float lr, float rho, float epsilon, bool maximize=False, "
      "Tensor? lr_tensor=None, Tensor? rho_tensor=None, Tensor? epsilon_tensor=None) -> ()"
  );
  m.def("check_lists(Tensor[] params, Tensor[] grads, Tensor[] square_avgs, Tensor[] acc_deltas) -> ()");
  m.def(
      "grad_square_sums(Tensor[] params, Tensor[] grads, float? clipvalue=None, bool in_double=False, "
      "Tensor? grad_scale=None) -> Tensor"
  );
  m.def("launches() -> int");
  m.def("set_seed(int seed) -> int");
  m.def("set_edge_blocks(int count) -> int");
  m.def("small_table() -> int");
  m.def("large_table() -> int");
  m.def("chunk() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta_emulated, CPU, m) {
  m.impl("adadelta_", torch_adadelta::cuda::adadelta_<EmulatedDevice>);
  m.impl("adadelta_.unclipped", torch_adadelta::cuda::adadelta_<EmulatedDevice>);
  m.impl("check_lists", torch_adadelta::cuda::check_lists<EmulatedDevice>);
  m.impl("grad_square_sums", torch_adadelta::cuda::grad_square_sums<EmulatedDevice>);
}

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta_emulated, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("set_seed", TORCH_BOX(&set_seed));
  m.impl("set_edge_blocks", TORCH_BOX(&set_edge_blocks));
  m.impl("small_table", TORCH_BOX(&small_table));
  m.impl("large_table", TORCH_BOX(&large_table));
  m.impl("chunk", TORCH_BOX(&chunk));
}
