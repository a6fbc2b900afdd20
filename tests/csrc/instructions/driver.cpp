// Calls one of the CPU kernels' inner loops once, so that callgrind can count the instructions of `measured`:
//
//     driver SET LOOP COUNT
//
// Without arguments it lists, a line each, what can be asked for. It needs no library of PyTorch.
#include "../../../csrc/cpu/kernels/kernel_table.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

using namespace torch_adadelta;
using namespace torch_adadelta::cpu;

using Case = std::function<void(int64_t count)>;

#ifdef __clang__
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noipa))
#endif

// A name that callgrind can be told.
extern "C" ONE_COPY void measured(void (*run)(void*), void* context) { run(context); }

namespace {

template <typename Run>
void measure(Run run) {
  measured([](void* context) { (*static_cast<Run*>(context))(); }, &run);
}

// Memory in which the elements of every tensor are `one`, whose Item is the largest of theirs.
template <typename Item>
struct Tensors {
  std::vector<Item> memory[kTensors];
  char* data[kTensors];

  Tensors(int64_t count, Item one) {
    for (int slot = 0; slot < kTensors; ++slot) {
      memory[slot].assign(count, one);
      data[slot] = reinterpret_cast<char*>(memory[slot].data());
    }
  }
};

template <typename Item, typename T>
Case update(UpdateKernel<T> loop, Item one, const GradientClip<T>& clip) {
  return [=](int64_t count) {
    const Tensors<Item> tensors(count, one);
    const Hyperparameters<T> h({1.0, 0.95, 1e-7, 0});
    measure([&] { loop(tensors.data, 0, count, clip, h); });
  };
}

template <typename T>
Case average(AverageKernel<T> loop, T one) {
  return [=](int64_t count) {
    const Tensors<T> tensors(count, one);
    double values[kHyperparameters] = {};
    values[kEmaMomentum] = 0.99;
    const Hyperparameters<T> h(values);
    measure([&] { loop(tensors.data, 0, count, h); });
  };
}

template <typename Item, typename T>
Case squares(SquaresKernel<Item, T> loop, Item one) {
  return [=](int64_t count) {
    alignas(64) double lanes[kSumLanes] = {};
    const std::vector<Item> grad(count, one);
    measure([&] { loop(lanes, grad.data(), count, std::numeric_limits<T>::infinity(), 0); });
  };
}

std::vector<std::pair<std::string, Case>> cases(const KernelTable& kernels) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  using Float = GradientClip<float>;
  const auto none = Float::by_factor(kNone, 1.0);
  constexpr float kOnes = 0x1.007fp0f;  // or two bfloat16 of 1
  const auto in_place = [&](ParamFormat param, ParamFormat state) { return kernels.in_float.updates[param][state]; };
  return {
      {"update_float", update<float, float>(in_place(kFloat32, kFloat32), 1.0f, none)},
      {"update_double",
       update<double, double>(
           kernels.in_double.updates[kFloat64][kFloat64], 1.0, GradientClip<double>::by_factor(kNone, 1.0)
       )},
      {"update_half", update<uint16_t, float>(in_place(kFloat16, kFloat16), 0x3c00, none)},
      {"update_bfloat16", update<uint16_t, float>(in_place(kBFloat16, kBFloat16), 0x3f80, none)},
      {"update_float_bfloat16_state", update<float, float>(in_place(kFloat32, kBFloat16), kOnes, none)},
      {"update_bfloat16_float_state", update<float, float>(in_place(kBFloat16, kFloat32), kOnes, none)},
      {"update_master_float_state", update<float, float>(in_place(kMaster, kFloat32), kOnes, none)},
      {"update_master_bfloat16_state", update<uint16_t, float>(in_place(kMaster, kBFloat16), 0x3f80, none)},
      {"update_float_clipvalue", update<float, float>(in_place(kFloat32, kFloat32), 1.0f, Float::by_factor(0.5, 1.0))},
      {"update_float_clipnorm",
       update<float, float>(in_place(kFloat32, kFloat32), 1.0f, Float::by_norm(kNone, 0.5, 4.0))},
      {"average_float", average<float>(kernels.in_float.averages[kFloat32], 1.0f)},
      {"average_double", average<double>(kernels.in_double.averages[kFloat64], 1.0)},
      {"average_half", average<float>(kernels.in_float.averages[kFloat16], kOnes)},
      {"average_bfloat16", average<float>(kernels.in_float.averages[kBFloat16], kOnes)},
      {"average_master", average<float>(kernels.in_float.averages[kMaster], kOnes)},
      {"add_squares_float", squares<float, float>(kernels.in_float.add_squares, 1.0f)},
      {"add_squares_double", squares<double, double>(kernels.in_double.add_squares, 1.0)},
      {"add_squares_half", squares<uint16_t, float>(kernels.add_squares_half, 0x3c00)},
      {"add_squares_bfloat16", squares<uint16_t, float>(kernels.add_squares_bfloat16, 0x3f80)},
  };
}

const std::vector<std::pair<std::string, const KernelTable&>> sets = {
    {"default", default_kernels},
#ifdef ADADELTA_CPU_DISPATCH
    {"AVX2", avx2_kernels},  // valgrind knows no AVX-512
#endif
};

}  // namespace

int main(int argc, char** argv) {
  for (const auto& [set, kernels] : sets) {
    for (const auto& [name, run] : cases(kernels)) {
      if (argc == 1) {
        std::printf("%s %s\n", set.c_str(), name.c_str());
      } else if (argc == 4 && set == argv[1] && name == argv[2]) {
        run(std::atoll(argv[3]));
        return 0;
      }
    }
  }
  return argc == 1 ? 0 : 1;
}
