// The ops of csrc/cuda for CPU tensors, as torch_adadelta_emulated: the same kernels and launches, without a GPU.
#include "emulator.h"

#include "../../../csrc/cuda/sparse.cuh"
#include "../../../csrc/cuda/square_sums.cuh"
#include "../../../csrc/cuda/update.cuh"
#include "../../../csrc/schemas.h"

namespace {

struct EmulatedDevice {
  static int32_t type() { return aoti_torch_device_type_cpu(); }

  explicit EmulatedDevice(int32_t) {}

  template <typename Parameters>
  void launch(void (*kernel)(const Parameters&), int64_t blocks, unsigned threads, const Parameters& parameters) const {
    if constexpr (requires { parameters.unit_count; }) {  // sums of units: those that no block wrote are zero
      for (int i = 0; emulator::edge_blocks != 0 && i < parameters.count; ++i) {
        double* units = parameters.units[i];
        const int64_t end = parameters.unit_count[i] - emulator::edge_blocks;
        std::fill(units + std::min(emulator::edge_blocks, end), units + end, 0.0);
      }
    }
    emulator::launch<const Parameters&>(kernel, blocks, threads, parameters);
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

// Of parameters without and with averages and remainders, the kinds 0 to 3.
int64_t table(int64_t kind, bool large, bool segments) {
  using namespace torch_adadelta::cuda;
  const auto of = [&](auto own) -> int64_t {
    using Own = decltype(own);
    if (segments) {
      return large ? kSegments<Own::kLarge, Own> : kSegments<Own::kSmall, Own>;
    }
    return large ? Own::kLarge : Own::kSmall;
  };
  switch (kind) {
    case 0:
      return of(Optionals<false, false>());
    case 1:
      return of(Optionals<true, false>());
    case 2:
      return of(Optionals<false, true>());
    default:
      return of(Optionals<true, true>());
  }
}

int64_t chunk() { return torch_adadelta::cuda::kChunk; }

}  // namespace

STABLE_TORCH_LIBRARY(torch_adadelta_emulated, m) {
  torch_adadelta::define_ops(m);
  m.def("launches() -> int");
  m.def("set_seed(int seed) -> int");
  m.def("set_edge_blocks(int count) -> int");
  m.def("table(int kind, bool large, bool segments) -> int");
  m.def("chunk() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta_emulated, CPU, m) {
  m.impl("adadelta_", torch_adadelta::cuda::adadelta_<EmulatedDevice>);
  m.impl("grad_square_sums", torch_adadelta::cuda::grad_square_sums<EmulatedDevice>);
  m.impl("sparse_adadelta_", torch_adadelta::cuda::sparse_adadelta_<EmulatedDevice>);
  m.impl("first_invalid_indices", torch_adadelta::cuda::first_invalid_indices<EmulatedDevice>);
}

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta_emulated, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("set_seed", TORCH_BOX(&set_seed));
  m.impl("set_edge_blocks", TORCH_BOX(&set_edge_blocks));
  m.impl("table", TORCH_BOX(&table));
  m.impl("chunk", TORCH_BOX(&chunk));
}
