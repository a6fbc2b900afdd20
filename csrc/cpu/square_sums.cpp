// The sums of squares behind the norms on the CPU: one parallel call over the elements of all gradients of a call.
#include "blocks.h"
#include "kernels/kernel_table.h"
#include "parallel.h"

#include "../options.h"
#include "../square_sums.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

namespace torch_adadelta::cpu {
namespace {

// What gradients are divided by, one after the other.
struct GradientScales {
  float grad_scale;
  double loss_scale_factor;
};

// The elements [begin, end) of one gradient, which are one chunk at most. T is the opmath dtype.
template <typename T>
double chunk_sum(
    const KernelTable& kernels,
    const Gradient& gradient,
    int64_t begin,
    int64_t end,
    T limit,
    const GradientScales& scales
) {
  const T scale = scales.grad_scale;
  const T loss_scale = static_cast<T>(scales.loss_scale_factor);
  const int64_t width = gradient.is_complex ? 2 : 1;
  const auto add_squares = [&](double* lanes, const T* grad, int64_t count, int64_t pages_ahead) {
    gradient.is_complex ? kernels.in<T>().add_complex_squares(lanes, grad, count, pages_ahead)
                        : kernels.in<T>().add_squares(lanes, grad, count, limit, pages_ahead);
  };

  alignas(64) double lanes[kSumLanes] = {};
  if (scale == T(1) && loss_scale == T(1) && gradient.layout == nullptr) {
    const int64_t size = item_size(gradient.dtype), count = end - begin;
    const int64_t pages_ahead = pages_ahead_in(gradient.numel * width * size);
    const char* from = gradient.data + begin * width * size;
    if (gradient.dtype == kDtypeOf<T>) {
      add_squares(lanes, reinterpret_cast<const T*>(from), count, pages_ahead);
      return kernels.sum_lanes(lanes);
    }
    if constexpr (std::is_same_v<T, float>) {
      const auto* half = reinterpret_cast<const uint16_t*>(from);
      if (gradient.dtype == Dtype::kFloat16 && !gradient.is_complex) {
        kernels.add_squares_half(lanes, half, count, limit, pages_ahead);
        return kernels.sum_lanes(lanes);
      }
      if (gradient.dtype == Dtype::kBFloat16) {
        kernels.add_squares_bfloat16(lanes, half, count, limit, pages_ahead);
        return kernels.sum_lanes(lanes);
      }
    }
  }
  alignas(64) T block[kBlock];
  const int64_t step = kBlock / width;
  static_assert(kBlock / 2 % kSumLanes == 0, "a block begins at lane 0");
  for (int64_t at = begin; at < end; at += step) {
    const int64_t count = std::min(step, end - at);
    load_block<kGrad>(kernels, block, gradient.data, gradient.dtype, gradient.layout, at * width, count * width);
    if (scale != T(1)) {
      std::for_each(block, block + count * width, [&](T& g) { g = g / scale; });
    }
    if (loss_scale != T(1)) {
      std::for_each(block, block + count * width, [&](T& g) { g = g / loss_scale; });
    }
    add_squares(lanes, block, count, 0);
  }
  return kernels.sum_lanes(lanes);
}

// The elements [begin, end) of one gradient, which are one unit at most.
double unit_sum(
    const KernelTable& kernels,
    const Gradient& gradient,
    int64_t begin,
    int64_t end,
    double clipvalue,
    const GradientScales& scales
) {
  double chunks[kUnitChunks];
  int64_t count = 0;
  for (; begin < end; begin += kSumChunk) {
    const int64_t stop = std::min(begin + kSumChunk, end);
    chunks[count++] = gradient.in_double
                          ? chunk_sum<double>(kernels, gradient, begin, stop, clipvalue, scales)
                          : chunk_sum<float>(kernels, gradient, begin, stop, static_cast<float>(clipvalue), scales);
  }
  return pairwise_sum(chunks, count);
}

// Writes the sum of each gradient to `sums`, at the gradient's index. `units` is room for the sums of all units.
void sum_squares(
    const Gradients& lists, double clipvalue, const GradientScales& scales, std::vector<double>& units, double* sums
) {
  const KernelTable& kernels = current_kernels();
  const auto& gradients = lists.gradients;
  const auto start_of = [](const Gradient& gradient) { return gradient.end - gradient.numel; };

  // Where the units of a gradient begin leaves room for those of all gradients before it.
  units.resize(lists.numel() / kUnit + gradients.size());
  const auto units_of = [&](size_t i) { return units.data() + start_of(gradients[i]) / kUnit + i; };

  // Each thread takes the units that begin in its range.
  const auto sum_range = [&](int64_t begin, int64_t end) {
    const auto first = std::upper_bound(
        gradients.begin(), gradients.end(), begin, [](int64_t position, const Gradient& g) { return position < g.end; }
    );
    for (size_t i = first - gradients.begin(); i < gradients.size() && start_of(gradients[i]) < end; ++i) {
      const Gradient& gradient = gradients[i];
      const int64_t skipped = std::max(begin - start_of(gradient), int64_t(0));
      const int64_t stop = std::min(end - start_of(gradient), gradient.numel);
      for (int64_t unit = (skipped + kUnit - 1) / kUnit; unit * kUnit < stop; ++unit) {
        const int64_t unit_end = std::min((unit + 1) * kUnit, gradient.numel);
        units_of(i)[unit] = unit_sum(kernels, gradient, unit * kUnit, unit_end, clipvalue, scales);
      }
    }
  };
  // Below a unit, another thread costs more than it saves.
  parallel_ranges(lists.numel(), kUnit, sum_range);

  for (size_t i = 0; i < gradients.size(); ++i) {
    sums[gradients[i].index] = pairwise_sum(units_of(i), (gradients[i].numel + kUnit - 1) / kUnit);
  }
}

// grad_square_sums in schemas.h. Boxed, as adadelta_ is.
void grad_square_sums(StableIValue* stack, uint64_t, uint64_t) {
  static thread_local Gradients gradients;
  static thread_local std::vector<double> units;
  before_writing([&] {
    const SquareSumArguments arguments(ArgumentReader(stack), gradients, aoti_torch_device_type_cpu());
    torch::stable::Tensor result = arguments.new_result();
    auto* sums = static_cast<double*>(result.mutable_data_ptr());
    std::fill_n(sums, result.numel(), 0.0);
    const float grad_scale = arguments.grad_scale() != nullptr ? *arguments.grad_scale() : 1.0f;
    sum_squares(gradients, arguments.clipvalue(), {grad_scale, arguments.loss_scale_factor()}, units, sums);
    stack[0] = torch::stable::detail::from(result);
  });
}

}  // namespace
}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) { m.impl("grad_square_sums", torch_adadelta::cpu::grad_square_sums); }
