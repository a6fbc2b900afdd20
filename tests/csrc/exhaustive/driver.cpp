// Compares what the AVX-512 kernels compute in ways of their own with what it stands for, bit by bit:
//
//     driver
//
// prints for how many of every root in range, with and without denormal numbers, inverses by multiplication differ
// from the processor's quotients, and for how many of every mantissa with every estimate that the instruction set's
// specification allows. Powers of 2 only scale a root and its steps, so the mantissas of [1, 2) stand for all; a
// processor whose estimates differ from this one's gets the same bits. It also prints for how many groups of every
// float those rounded to bfloat16 differ from numbers rounded one by one, and for how many averages, all denormal ones
// among them, a decay without denormal products differs, with a hundred rho.
//
// KERNELS is the file of the instruction set.
#include KERNELS

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

using namespace torch_adadelta;
using namespace torch_adadelta::cpu;

constexpr double kEstimateError = 1.0 / (1 << 14);

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

__m512i sixteen_from(uint32_t first) {
  return _mm512_add_epi32(
      _mm512_set1_epi32(static_cast<int>(first)), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
  );
}

int64_t count_differences(__m512 x, __m512 y) {
  const __mmask16 differ = _mm512_cmpneq_epi32_mask(_mm512_castps_si512(x), _mm512_castps_si512(y));
  const __mmask16 are_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) & _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
  return __builtin_popcount(static_cast<unsigned>(differ & ~are_nan));
}

void every_inverse(const char* name) {
  int64_t different = 0;
  const uint32_t first = bits_as<uint32_t>(0x1p-64f), last = bits_as<uint32_t>(0x1p64f);
  for (uint32_t bits = first; bits < last; bits += 16) {
    const __m512 root = _mm512_castsi512_ps(sixteen_from(bits));
    different += count_differences(inverse_by_multiplying(root), _mm512_div_ps(_mm512_set1_ps(1.0f), root));
  }
  std::printf("inverse of every root in range%s: %lld\n", name, static_cast<long long>(different));
}

// With denormal numbers only: without them no result of arithmetic is one that could be rounded.
void every_rounding() {
  // What a group makes of the numbers of its elements tells which of its floats each is rounded from.
  alignas(64) uint16_t places[kGroup], rounded[kGroup], expected[kGroup];
  alignas(64) float place_of[kGroup], group[kGroup];
  for (int64_t k = 0; k < kGroup; ++k) {
    places[k] = Bfloat16::narrow(static_cast<float>(k));
  }
  Bfloat16::widen_group(place_of, places);
  int64_t different = 0;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += kGroup) {
    for (int64_t k = 0; k < kGroup; ++k) {
      group[k] = bits_as<float>(static_cast<uint32_t>(bits + k));
    }
    Bfloat16::narrow_group(rounded, group);
    for (int64_t k = 0; k < kGroup; ++k) {
      expected[static_cast<int64_t>(place_of[k])] = Bfloat16::narrow(group[k]);
    }
    different += std::memcmp(rounded, expected, sizeof(rounded)) != 0;
  }
  std::printf("bfloat16 of every float: %lld\n", static_cast<long long>(different));
}

void every_estimate() {
  int64_t different = 0, tried = 0;
  for (uint32_t bits = bits_as<uint32_t>(1.0f); bits < bits_as<uint32_t>(2.0f); ++bits) {
    const float root = bits_as<float>(bits);
    const double inverse = 1 / static_cast<double>(root);
    const uint32_t first = bits_as<uint32_t>(static_cast<float>(inverse * (1 - kEstimateError))) - 1;
    const uint32_t last = bits_as<uint32_t>(static_cast<float>(inverse * (1 + kEstimateError))) + 1;
    const __m512 roots = _mm512_set1_ps(root), expected = _mm512_div_ps(_mm512_set1_ps(1.0f), roots);
    for (uint32_t estimate = first; estimate <= last; estimate += 16, tried += 16) {
      const __m512 estimates = _mm512_castsi512_ps(sixteen_from(estimate));
      different += count_differences(inverse_from_estimate(roots, estimates), expected);
    }
  }
  std::printf(
      "inverse from every estimate, %lld billion: %lld\n",
      static_cast<long long>(tried / 1000000000),
      static_cast<long long>(different)
  );
}

// Every denormal number with many rho; with some of them, also half of all floats.
void every_decay() {
  int64_t different = 0;
  const auto compare = [&](float rho, uint64_t first, uint64_t last, uint64_t step) {
    const Hyperparameters<float> h({0, rho});
    for (uint64_t bits = first; bits < last; bits += step) {
      __m512 averages = _mm512_castsi512_ps(sixteen_from(static_cast<uint32_t>(bits))), expected = averages;
      decay_with_denormals(averages, h);
      decay(expected, h);
      different += count_differences(averages, expected);
    }
  };
  constexpr uint64_t kFloats = uint64_t(1) << 32, kDenormals = uint64_t(1) << 23;
  for (const float rho : {0.0f, 0x1p-149f, 0x1p-24f, 0.5f, 0.9f, 0.95f, 0x1.fffffep-1f, 1.0f}) {
    compare(rho, 0, kFloats, 32);
    compare(rho, 0, kDenormals, 16);
  }
  uint32_t random = 1;
  for (int i = 0; i < 100; ++i) {
    random = random * 1664525 + 1013904223;
    compare(static_cast<float>(random >> 8) * 0x1p-24f, 0, kDenormals, 16);
  }
  std::printf("decay: %lld\n", static_cast<long long>(different));
}

}  // namespace

int main() {
  every_rounding();
  every_decay();
  every_inverse("");
  constexpr unsigned kFlushAndDenormalsAreZero = 0x8040;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlushAndDenormalsAreZero);
  every_inverse(" without denormal numbers");
  _mm_setcsr(before);
  every_estimate();
}
