// Runs every kernel of an instruction set, and prints a checksum of what each case computed:
//
//     driver            lists the instruction sets of this build that the processor has
//     driver SET        prints the cases with their checksums
//     driver SET CASE   prints the bits that one case computed, a number a line
//
// Numbers are made by integer arithmetic, so that every compiler and processor must print the same. All nan count as
// one: which of them an operation gives is the processor's choice. It needs no library of PyTorch.
#include "../../../csrc/cpu/kernels/kernel_table.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

using namespace torch_adadelta;
using namespace torch_adadelta::cpu;

namespace {

// ---- Numbers --------------------------------------------------------------------------------------------------------

// What memory holds as its bits, and how many of them are the exponent and the mantissa.
template <typename Item, int exponent_bits, int mantissa_bits>
struct Format {
  using Memory = Item;
  using Bits =
      std::conditional_t<sizeof(Item) == 2, uint16_t, std::conditional_t<sizeof(Item) == 4, uint32_t, uint64_t>>;
  static constexpr uint64_t kMantissa = (uint64_t(1) << mantissa_bits) - 1;
  static constexpr uint64_t kInfinity = ((uint64_t(1) << exponent_bits) - 1) << mantissa_bits;
  static constexpr uint64_t kSign = kInfinity + kMantissa + 1;
  static constexpr uint64_t kBias = kInfinity >> (mantissa_bits + 1);
  static constexpr uint64_t kUnits = kMantissa + 1;

  static Item from_bits(uint64_t bits) {
    const Bits narrowed = static_cast<Bits>(bits);
    Item item;
    std::memcpy(&item, &narrowed, sizeof(item));
    return item;
  }

  static uint64_t to_bits(Item item) {
    Bits bits;
    std::memcpy(&bits, &item, sizeof(bits));
    return (bits & ~kSign) > kInfinity ? kInfinity + 1 : bits;
  }
};

using Float = Format<float, 8, 23>;
using Double = Format<double, 11, 52>;
using Half = Format<uint16_t, 5, 10>;
using BFloat16 = Format<uint16_t, 8, 7>;

// Any bits.
struct Int16 : Format<uint16_t, 15, 0> {
  static uint64_t to_bits(uint16_t item) { return item; }
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t operator()() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

 private:
  uint64_t state_;
};

enum Kind { kOrdinary, kDenormals, kLarge, kExtremes, kKinds };

// Numbers from 2^-7 to 2; or, among such, denormal ones and zeros; or, seldom, the largest; or whatever bits there are,
// infinities and nan too.
template <typename F>
std::vector<typename F::Memory> numbers(int64_t count, Kind kind, bool has_signs, uint64_t seed) {
  Random random(seed);
  std::vector<typename F::Memory> result;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t mantissa = random() & F::kMantissa, sign = has_signs && (random() & 1) ? F::kSign : 0;
    const uint64_t choice = random() % 16;
    uint64_t bits = (F::kBias - random() % 8) * F::kUnits + mantissa;
    if (kind == kDenormals && choice < 8) {
      bits = choice < 2 ? 0 : choice < 4 ? choice - 1 : mantissa;
    } else if (kind == kLarge && random() % 64 == 0) {
      bits = F::kInfinity - 1 - random() % F::kUnits;
    } else if (kind == kExtremes && choice < 12) {
      bits = choice == 0   ? F::kInfinity
             : choice == 1 ? F::kInfinity + 1 + mantissa / 2
             : choice == 2 ? F::kInfinity - 1 - mantissa % 4
                           : random() % F::kInfinity;
    }
    result.push_back(F::from_bits(bits | sign));
  }
  return result;
}

// Around groups of 32 elements, what takes long stretches, and a check now and then.
constexpr int64_t kLengths[] = {0, 1, 15, 31, 32, 33, 64, 255, 256, 257, 1024 + 95, 2048 + 256};

// ---- Cases ----------------------------------------------------------------------------------------------------------

using Results = std::vector<uint64_t>;

template <typename F>
void append(Results& results, const std::vector<typename F::Memory>& items) {
  for (const auto item : items) {
    results.push_back(F::to_bits(item));
  }
}

template <typename T>
std::vector<std::pair<std::string, GradientClip<T>>> clips() {
  using Clip = GradientClip<T>;
  constexpr double kNone = std::numeric_limits<double>::infinity();
  return {
      {"", Clip::by_factor(kNone, 1)},
      {", maximize", Clip::by_factor(kNone, 1).negated_if(true)},
      {", clipvalue", Clip::by_factor(0.25, 1)},
      {", clipvalue and maximize", Clip::by_factor(0.25, 1).negated_if(true)},
      {", factor", Clip::by_factor(kNone, 0.3)},
      {", clipnorm", Clip::by_norm(kNone, 0.5, 12.25)},
      {", clipvalue and clipnorm", Clip::by_norm(0.25, 0.5, 12.25)},
      {", scale", Clip::by_factor(kNone, 1).scaled_by(T(3))},
      {", both scales", Clip::by_factor(kNone, 1).scaled_by(T(3), T(7))},
      {", all", Clip::by_norm(0.25, 0.5, 12.25).scaled_by(T(3)).negated_if(true)},
  };
}

// lr, rho, epsilon, maximize: usual ones, and those for which the inverse of a root or a decay is special.
constexpr double kHyperparameterSets[][kHyperparameters] = {
    {1, 0.95, 1e-7, 0}, {0.001, 0.5, 1e-30, 0}, {1, 0.9, 0, 0}, {1e30, 1, 8e37, 0}, {1, 0, 1e-7, 0}, {1, 1.25, 1e-7, 0}
};

// Where tensors begin, by their slot.
struct Tensors {
  char* data[kTensors] = {};

  template <typename Item>
  void set(Slot slot, std::vector<Item>& items) {
    data[slot] = reinterpret_cast<char*>(items.data());
  }
};

// The format of the parameter, of which the gradient has it too, and that of the state; a master has its remainder
// beside.
template <typename F, typename State, typename T>
Results update(UpdateKernel<T> kernel, bool is_master, const GradientClip<T>& clip) {
  Results results;
  for (const auto& values : kHyperparameterSets) {
    const Hyperparameters<T> h(values);
    for (int kind = 0; kind < kKinds; ++kind) {
      for (const int64_t count : kLengths) {
        auto param = numbers<F>(count, static_cast<Kind>(kind), true, 1);
        auto square_avg = numbers<State>(count, static_cast<Kind>(kind), false, 2);
        auto acc_delta = numbers<State>(count, static_cast<Kind>(kind), false, 3);
        auto remainder = numbers<Int16>(count, kExtremes, true, 6);
        Tensors tensors;
        tensors.set(kParam, param);
        tensors.set(kSquareAvg, square_avg);
        tensors.set(kAccDelta, acc_delta);
        if (is_master) {
          tensors.set(kRemainder, remainder);
        }
        for (uint64_t step = 0; step < 2; ++step) {
          auto grad = numbers<F>(count, static_cast<Kind>(kind), true, 4 + step);
          tensors.set(kGrad, grad);
          kernel(tensors.data, 0, count, clip, h);
        }
        append<F>(results, param);
        append<State>(results, square_avg);
        append<State>(results, acc_delta);
        if (is_master) {
          append<Int16>(results, remainder);
        }
      }
    }
  }
  return results;
}

// ema_momentum and overwrites.
constexpr double kAverages[][2] = {{0.99, 0}, {0.75, 1}, {0, 1}, {1, 0}};

template <typename F, typename Own>
Results average(AverageKernel<typename Own::Memory> kernel, bool is_master = false) {
  Results results;
  for (const auto& [momentum, overwrites] : kAverages) {
    double values[kHyperparameters] = {};
    values[kEmaMomentum] = momentum;
    values[kOverwrites] = overwrites;
    const Hyperparameters<typename Own::Memory> h(values);
    for (int kind = 0; kind < kKinds; ++kind) {
      for (const int64_t count : kLengths) {
        auto param = numbers<F>(count, static_cast<Kind>(kind), true, 1);
        auto own = numbers<Own>(count, static_cast<Kind>(kind), true, 2);
        auto remainder = numbers<Int16>(count, kExtremes, true, 6);
        Tensors tensors;
        tensors.set(kParam, param);
        tensors.set(kAverage, own);
        if (is_master) {
          tensors.set(kRemainder, remainder);
        }
        kernel(tensors.data, 0, count, h);
        append<F>(results, param);
        append<Own>(results, own);
        if (is_master) {
          append<Int16>(results, remainder);
        }
      }
    }
  }
  return results;
}

template <typename F>
Results add(AddKernel<typename F::Memory> kernel, const GradientClip<typename F::Memory>& clip) {
  Results results;
  for (const int64_t count : kLengths) {
    auto sum = numbers<F>(count, kOrdinary, true, 1);
    for (int kind = 0; kind < kKinds; ++kind) {
      kernel(sum.data(), numbers<F>(count, static_cast<Kind>(kind), true, 2).data(), count, clip);
      append<F>(results, sum);
    }
  }
  return results;
}

// `width`: 2 for complex numbers, of which there are then half as many.
template <typename F, typename Run>
Results squares(const KernelTable& kernels, int64_t width, const Run& run) {
  Results results;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (const int64_t count : kLengths) {
      const auto grad = numbers<F>(count * width, static_cast<Kind>(kind), true, 1);
      alignas(64) double lanes[kSumLanes] = {};
      run(lanes, grad.data(), count);
      append<Double>(results, std::vector<double>(lanes, lanes + kSumLanes));
      results.push_back(Double::to_bits(kernels.sum_lanes(lanes)));
    }
  }
  return results;
}

template <typename To, typename From>
Results cast(CastKernel<typename To::Memory, typename From::Memory> kernel) {
  Results results;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (const int64_t count : kLengths) {
      std::vector<typename To::Memory> to(count);
      kernel(to.data(), numbers<From>(count, static_cast<Kind>(kind), true, 1).data(), count);
      append<To>(results, to);
    }
  }
  return results;
}

// From floats and back, and of pairs that no float is taken apart into.
Results masters(const KernelTable& kernels) {
  Results results;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (const int64_t count : kLengths) {
      std::vector<uint16_t> params(count), remainders(count);
      std::vector<float> floats(count);
      const auto from = numbers<Float>(count, static_cast<Kind>(kind), true, 1);
      kernels.master_from_float(params.data(), remainders.data(), from.data(), count);
      append<BFloat16>(results, params);
      append<Int16>(results, remainders);
      kernels.float_from_master(floats.data(), params.data(), remainders.data(), count);
      append<Float>(results, floats);
      params = numbers<BFloat16>(count, static_cast<Kind>(kind), true, 2);
      remainders = numbers<Int16>(count, kExtremes, true, 3);
      kernels.float_from_master(floats.data(), params.data(), remainders.data(), count);
      append<Float>(results, floats);
    }
  }
  return results;
}

template <typename Run>
void all_cases(const KernelTable& kernels, const Run& run) {
  for (const auto& [name, clip] : clips<float>()) {
    const auto in_place = [&](ParamFormat param, ParamFormat state) { return kernels.in_float.updates[param][state]; };
    run("update float32" + name, update<Float, Float>(in_place(kFloat32, kFloat32), false, clip));
    run("update float16" + name, update<Half, Half>(in_place(kFloat16, kFloat16), false, clip));
    run("update bfloat16" + name, update<BFloat16, BFloat16>(in_place(kBFloat16, kBFloat16), false, clip));
    run("update float32 with bfloat16 state" + name,
        update<Float, BFloat16>(in_place(kFloat32, kBFloat16), false, clip));
    run("update bfloat16 with float32 state" + name,
        update<BFloat16, Float>(in_place(kBFloat16, kFloat32), false, clip));
    run("update masters with float32 state" + name, update<BFloat16, Float>(in_place(kMaster, kFloat32), true, clip));
    run("update masters with bfloat16 state" + name,
        update<BFloat16, BFloat16>(in_place(kMaster, kBFloat16), true, clip));
    run("add float32" + name, add<Float>(kernels.in_float.add, clip));
  }
  for (const auto& [name, clip] : clips<double>()) {
    run("update float64" + name, update<Double, Double>(kernels.in_double.updates[kFloat64][kFloat64], false, clip));
    run("add float64" + name, add<Double>(kernels.in_double.add, clip));
  }
  run("average float32", average<Float, Float>(kernels.in_float.averages[kFloat32]));
  run("average float64", average<Double, Double>(kernels.in_double.averages[kFloat64]));
  run("average float16", average<Half, Float>(kernels.in_float.averages[kFloat16]));
  run("average bfloat16", average<BFloat16, Float>(kernels.in_float.averages[kBFloat16]));
  run("average masters", average<BFloat16, Float>(kernels.in_float.averages[kMaster], true));
  for (const auto& [name, limit] :
       {std::pair{"", std::numeric_limits<float>::infinity()}, std::pair{", clipvalue", 0.25f}}) {
    const auto squares_of = [&, limit = limit](const auto& kernel) {
      return [&, limit](double* lanes, const auto* grad, int64_t count) { kernel(lanes, grad, count, limit, 0); };
    };
    const std::string suffix = name;
    run("squares float32" + suffix, squares<Float>(kernels, 1, squares_of(kernels.in_float.add_squares)));
    run("squares float64" + suffix, squares<Double>(kernels, 1, squares_of(kernels.in_double.add_squares)));
    run("squares float16" + suffix, squares<Half>(kernels, 1, squares_of(kernels.add_squares_half)));
    run("squares bfloat16" + suffix, squares<BFloat16>(kernels, 1, squares_of(kernels.add_squares_bfloat16)));
  }
  run("squares complex64", squares<Float>(kernels, 2, [&](double* lanes, const float* grad, int64_t count) {
        kernels.in_float.add_complex_squares(lanes, grad, count, 0);
      }));
  run("squares complex128", squares<Double>(kernels, 2, [&](double* lanes, const double* grad, int64_t count) {
        kernels.in_double.add_complex_squares(lanes, grad, count, 0);
      }));
  run("float32 from float16", cast<Float, Half>(kernels.float_from_half));
  run("float32 from bfloat16", cast<Float, BFloat16>(kernels.float_from_bfloat16));
  run("float32 from float64", cast<Float, Double>(kernels.float_from_double));
  run("float64 from float32", cast<Double, Float>(kernels.double_from_float));
  run("float16 from float32", cast<Half, Float>(kernels.half_from_float));
  run("bfloat16 from float32", cast<BFloat16, Float>(kernels.bfloat16_from_float));
  run("masters", masters(kernels));
}

// FNV-1a.
uint64_t checksum(const Results& results) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const uint64_t bits : results) {
    for (int shift = 0; shift < 64; shift += 8) {
      hash = (hash ^ (bits >> shift & 0xff)) * 0x100000001b3u;
    }
  }
  return hash;
}

std::vector<std::pair<std::string, const KernelTable*>> instruction_sets() {
  std::vector<std::pair<std::string, const KernelTable*>> sets{{"default", &default_kernels}};
#ifdef ADADELTA_CPU_DISPATCH
  if (__builtin_cpu_supports("avx2")) {
    sets.push_back({"AVX2", &avx2_kernels});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back({"AVX512", &avx512_kernels});
    if (__builtin_cpu_supports("avx512bf16")) {
      sets.push_back({"AVX512_BF16", &avx512_bf16_kernels});
    }
  }
#endif
  return sets;
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& [set, kernels] : instruction_sets()) {
    if (argc == 1) {
      std::printf("%s\n", set.c_str());
    } else if (set == argv[1]) {
      all_cases(*kernels, [&](const std::string& name, const Results& results) {
        if (argc == 2) {
          std::printf("%s: %016" PRIx64 "\n", name.c_str(), checksum(results));
        } else if (name == argv[2]) {
          for (const uint64_t bits : results) {
            std::printf("%" PRIx64 "\n", bits);
          }
        }
      });
    }
  }
}
