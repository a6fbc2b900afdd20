// Takes every float apart, as the master of a bfloat16 parameter, and puts every pair of halves together:
//
//     driver
//
// prints, for the number by itself, for groups in each order that the instruction set has, and for whole tensors, how
// many differ from what masters.h promises.
//
// KERNELS is the file of the instruction set.
#include KERNELS

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

using namespace torch_adadelta;
using namespace torch_adadelta::cpu;

constexpr uint64_t kFloats = uint64_t(1) << 32;

bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }

bool is_infinite(uint32_t bits) { return (bits & 0x7fffffff) == 0x7f800000; }

// A group of numbers in the order of memory.
struct Numbers {
  uint16_t params[kGroup], remainders[kGroup];
  uint32_t masters[kGroup];
};

struct ByItself {
  static constexpr const char* kName = "by itself";

  static void split(Numbers& numbers) {
    for (int64_t k = 0; k < kGroup; ++k) {
      const SplitMaster halves = split_master(numbers.masters[k]);
      numbers.params[k] = halves.param;
      numbers.remainders[k] = halves.remainder;
    }
  }

  static void join(Numbers& numbers) {
    for (int64_t k = 0; k < kGroup; ++k) {
      numbers.masters[k] = join_master(numbers.params[k], numbers.remainders[k]);
    }
  }
};

struct Whole {
  static constexpr const char* kName = "as a tensor";

  static void split(Numbers& numbers) {
    float masters[kGroup];
    std::memcpy(masters, numbers.masters, sizeof(masters));
    cpu::split(numbers.params, numbers.remainders, masters, kGroup);
  }

  static void join(Numbers& numbers) {
    float masters[kGroup];
    cpu::join(masters, numbers.params, numbers.remainders, kGroup);
    std::memcpy(numbers.masters, masters, sizeof(masters));
  }
};

template <typename Format>
struct Group {
  static constexpr const char* kName = std::is_same_v<Format, Bfloat16> ? "in a group" : "in a group in order";

  // What a group makes of the numbers of its elements tells where in memory each of its floats stands.
  static std::array<int, kGroup> find_places() {
    uint16_t numbers[kGroup];
    float floats[kGroup];
    std::array<int, kGroup> result;
    for (int64_t k = 0; k < kGroup; ++k) {
      numbers[k] = Format::narrow(static_cast<float>(k));
    }
    Format::widen_group(floats, numbers);
    std::copy_n(floats, kGroup, result.begin());
    return result;
  }

  static inline const std::array<int, kGroup> places = find_places();

  static void split(Numbers& numbers) {
    float masters[kGroup];
    for (int64_t k = 0; k < kGroup; ++k) {
      masters[k] = float_of(numbers.masters[places[k]]);
    }
    Format::split_group(numbers.params, numbers.remainders, masters);
  }

  static void join(Numbers& numbers) {
    float masters[kGroup];
    Format::join_group(masters, numbers.params, numbers.remainders);
    for (int64_t k = 0; k < kGroup; ++k) {
      numbers.masters[places[k]] = bits_of(masters[k]);
    }
  }
};

// The nearest bfloat16, ties away from zero, and what the float has more; both together are the float again.
template <typename Way>
void every_master() {
  int64_t wrong = 0;
  for (uint64_t first = 0; first < kFloats; first += kGroup) {
    Numbers numbers;
    for (int64_t k = 0; k < kGroup; ++k) {
      numbers.masters[k] = static_cast<uint32_t>(first + k);
    }
    Way::split(numbers);
    for (int64_t k = 0; k < kGroup; ++k) {
      const uint32_t bits = static_cast<uint32_t>(first + k);
      const bool is_special = is_nan(bits);
      const uint16_t param = is_special ? 0x7fc0 | (bits >> 31 << 15) : (bits + 0x8000) >> 16;
      const auto remainder = static_cast<int64_t>(bits) - (static_cast<int64_t>(param) << 16);
      wrong += numbers.params[k] != param;
      wrong += static_cast<int16_t>(numbers.remainders[k]) != (is_special ? 0 : remainder);
    }
    Way::join(numbers);
    for (int64_t k = 0; k < kGroup; ++k) {
      const uint32_t bits = static_cast<uint32_t>(first + k);
      wrong += is_nan(bits) ? !is_nan(numbers.masters[k]) : numbers.masters[k] != bits;
    }
  }
  std::printf("every master %s: %lld\n", Way::kName, static_cast<long long>(wrong));
}

// Whoever wrote the parameter since: a nan stays one and no other number becomes one, no finite parameter becomes
// infinite, and no number moves by more than half a unit in the last place of its bfloat16, or changes its sign.
template <typename Way>
void every_pair() {
  int64_t wrong = 0;
  for (uint64_t first = 0; first < kFloats; first += kGroup) {
    Numbers numbers;
    for (int64_t k = 0; k < kGroup; ++k) {
      numbers.params[k] = static_cast<uint16_t>((first + k) >> 16);
      numbers.remainders[k] = static_cast<uint16_t>(first + k);
    }
    Way::join(numbers);
    for (int64_t k = 0; k < kGroup; ++k) {
      const uint32_t own = static_cast<uint32_t>(numbers.params[k]) << 16, bits = numbers.masters[k];
      const auto remainder = static_cast<int16_t>(numbers.remainders[k]);
      const uint32_t magnitude = own & 0x7fffffff;
      const bool is_stale = (magnitude == 0 && remainder < 0) || (is_infinite(own) && remainder > 0);
      wrong += is_nan(bits) != is_nan(own);
      wrong += is_infinite(bits) != (is_infinite(own) && remainder >= 0);
      if (!is_nan(own)) {
        wrong += bits != (is_stale ? own : own + static_cast<uint32_t>(remainder));
        wrong += bits >> 31 != own >> 31;
        wrong += std::abs(static_cast<int64_t>(bits) - static_cast<int64_t>(own)) > 0x8000;
      }
    }
  }
  std::printf("every pair %s: %lld\n", Way::kName, static_cast<long long>(wrong));
}

template <typename... Ways>
void every() {
  (every_master<Ways>(), ...);
  (every_pair<Ways>(), ...);
}

}  // namespace

int main() {
  if constexpr (std::is_same_v<Bfloat16, Bfloat16InOrder>) {  // every group is in order
    every<ByItself, Whole, Group<Bfloat16>>();
  } else {
    every<ByItself, Whole, Group<Bfloat16>, Group<Bfloat16InOrder>>();
  }
}
