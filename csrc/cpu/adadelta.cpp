// The dense update on the CPU: one parallel_for over the elements of all parameters of a call.
#include "blocks.h"
#include "loops.h"

#include "../tensor_lists.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>
#include <optional>

namespace torch_adadelta::cpu {
namespace {

// Elements below which another thread costs more than it saves (some 10 microseconds of work).
constexpr int64_t kGrain = 32768;

// ---- One parameter --------------------------------------------------------------------------------------------------

// The elements [begin, end) of one parameter, in the order of its memory. T is the arithmetic type.
template <typename T>
void update_range(
    const Loops& loops,
    const Entry& entry,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  UpdateLoop<T, T> update;
  if constexpr (std::is_same_v<T, float>) {
    update = loops.update_float;
  } else {
    update = loops.update_double;
  }
  const bool contiguous = entry.layout == nullptr;
  if (contiguous && entry.grad_dtype == entry.dtype && !entry.grad_aliases_param) {
    const auto update_in_place = [&](auto loop, auto* param) {
      using Item = std::remove_pointer_t<decltype(param)>;
      loop(
          param + begin,
          reinterpret_cast<const Item*>(entry.grad) + begin,
          reinterpret_cast<Item*>(entry.square_avg) + begin,
          reinterpret_cast<Item*>(entry.acc_delta) + begin,
          end - begin,
          clip,
          h
      );
    };
    if constexpr (std::is_same_v<T, float>) {
      if (entry.dtype == Dtype::kFloat16) {
        return update_in_place(loops.update_half, reinterpret_cast<uint16_t*>(entry.param));
      }
      if (entry.dtype == Dtype::kBFloat16) {
        return update_in_place(loops.update_bfloat16, reinterpret_cast<uint16_t*>(entry.param));
      }
    }
    return update_in_place(update, reinterpret_cast<T*>(entry.param));
  }

  alignas(64) T grad[kBlock], param[kBlock], square_avg[kBlock], acc_delta[kBlock];
  const int64_t size = item_size(entry.dtype);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    if (!contiguous) {
      load_strided<&Dimension::grad>(loops, grad, entry.grad, entry.grad_dtype, *entry.layout, at, count);
      load_strided<&Dimension::param>(loops, param, entry.param, entry.dtype, *entry.layout, at, count);
      load_strided<&Dimension::square_avg>(loops, square_avg, entry.square_avg, entry.dtype, *entry.layout, at, count);
      load_strided<&Dimension::acc_delta>(loops, acc_delta, entry.acc_delta, entry.dtype, *entry.layout, at, count);
      update(param, grad, square_avg, acc_delta, count, clip, h);
      store_strided<&Dimension::param>(loops, entry.param, entry.dtype, param, *entry.layout, at, count);
      store_strided<&Dimension::square_avg>(loops, entry.square_avg, entry.dtype, square_avg, *entry.layout, at, count);
      store_strided<&Dimension::acc_delta>(loops, entry.acc_delta, entry.dtype, acc_delta, *entry.layout, at, count);
      continue;
    }
    load_contiguous(loops, grad, entry.grad + at * item_size(entry.grad_dtype), entry.grad_dtype, count);
    load_contiguous(loops, param, entry.param + at * size, entry.dtype, count);
    load_contiguous(loops, square_avg, entry.square_avg + at * size, entry.dtype, count);
    load_contiguous(loops, acc_delta, entry.acc_delta + at * size, entry.dtype, count);
    update(param, grad, square_avg, acc_delta, count, clip, h);
    store_contiguous(loops, entry.param + at * size, entry.dtype, param, count);
    store_contiguous(loops, entry.square_avg + at * size, entry.dtype, square_avg, count);
    store_contiguous(loops, entry.acc_delta + at * size, entry.dtype, acc_delta, count);
  }
}

// ---- The ops --------------------------------------------------------------------------------------------------------

using torch::stable::detail::from;
using torch::stable::detail::to;
using OptionalTensor = std::optional<torch::stable::Tensor>;

// The number, or what replaces it: the one element of a floating-point CPU tensor.
double resolve(double number, const OptionalTensor& tensor, const char* name) {
  if (!tensor.has_value()) {
    return number;
  }
  if (tensor->numel() != 1 || !tensor->is_cpu()) {
    fail(name, "_tensor must be a CPU tensor of one element");
  }
  const void* data = tensor->const_data_ptr();
  switch (tensor->scalar_type()) {
    case torch::headeronly::ScalarType::Double:
      return *static_cast<const double*>(data);
    case torch::headeronly::ScalarType::Float:
      return *static_cast<const float*>(data);
    case torch::headeronly::ScalarType::Half:
      return *static_cast<const torch::headeronly::Half*>(data);
    case torch::headeronly::ScalarType::BFloat16:
      return *static_cast<const torch::headeronly::BFloat16*>(data);
    default:
      fail(name, "_tensor must have a floating-point dtype");
  }
}

// The clip options of one call.
struct Clip {
  double clipvalue;
  std::optional<double> clipnorm;
  const double* square_sums;  // with clipnorm: of each parameter's gradient
  double factor;
  bool maximize;

  template <typename T>
  GradientClip<T> of(const Entry& entry) const {
    const auto clip = clipnorm.has_value() ? GradientClip<T>::by_norm(clipvalue, *clipnorm, square_sums[entry.index])
                                           : GradientClip<T>::by_factor(clipvalue, factor);
    return clip.negated_if(maximize);
  }
};

void update_entries(
    const Entries& lists,
    const Clip& clip,
    const Hyperparameters<float>& in_float,
    const Hyperparameters<double>& in_double
) {
  const Loops& loops = current_loops();
  const auto update_entry = [&](const Entry& entry, int64_t begin, int64_t end) {
    if (entry.dtype == Dtype::kFloat64) {
      update_range(loops, entry, begin, end, clip.of<double>(entry), in_double);
    } else {
      update_range(loops, entry, begin, end, clip.of<float>(entry), in_float);
    }
  };
  const auto& entries = lists.entries;

  if (!lists.disjoint) {
    for (const Entry& entry : entries) {
      torch::stable::parallel_for(0, entry.numel, kGrain, [&](int64_t begin, int64_t end) {
        update_entry(entry, begin, end);
      });
    }
    return;
  }

  const auto update_range = [&](int64_t begin, int64_t end) {
    auto entry = std::upper_bound(entries.begin(), entries.end(), begin, [](int64_t position, const Entry& e) {
      return position < e.end;
    });
    for (; begin < end; ++entry) {
      const int64_t start = entry->end - entry->numel;
      const int64_t stop = std::min(end, entry->end);
      update_entry(*entry, begin - start, stop - start);
      begin = stop;
    }
  };
  torch::stable::parallel_for(0, lists.numel(), kGrain, update_range);
}

// Throws unless the clip options fit together and with the parameters, and returns them.
Clip read_clip(
    std::optional<double> clipvalue,
    std::optional<double> clipnorm,
    const OptionalTensor& square_sums,
    std::optional<double> factor,
    bool maximize,
    size_t param_count,
    int64_t complex_param
) {
  Clip clip{
      clipvalue.value_or(std::numeric_limits<double>::infinity()), clipnorm, nullptr, factor.value_or(1), maximize
  };
  check_clipvalue(clip.clipvalue, complex_param);
  if (clipnorm.has_value() != square_sums.has_value()) {
    fail("clipnorm and square_sums must be given together");
  }
  if (!clipnorm.has_value()) {
    return clip;
  }
  if (!(*clipnorm >= 0)) {
    fail("clipnorm must be a number >= 0, got ", *clipnorm);
  }
  if (factor.has_value()) {
    fail("clipnorm is ", *clipnorm, ", but a factor is given, too");
  }
  if (!square_sums->is_cpu() || square_sums->scalar_type() != torch::headeronly::ScalarType::Double ||
      square_sums->dim() != 1 || square_sums->numel() != static_cast<int64_t>(param_count) ||
      !square_sums->is_contiguous()) {
    fail(
        "square_sums must be a contiguous float64 CPU tensor with one element for each of ", param_count, " parameters"
    );
  }
  clip.square_sums = static_cast<const double*>(square_sums->const_data_ptr());
  return clip;
}

// adadelta_ in ops.cpp. Boxed, so that each list is read in place instead of becoming a vector of tensor objects.
void adadelta_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[0]), grads(stack[1]), square_avgs(stack[2]), acc_deltas(stack[3]);
  const auto lr_tensor = to<OptionalTensor>(stack[8]);
  const auto rho_tensor = to<OptionalTensor>(stack[9]);
  const auto epsilon_tensor = to<OptionalTensor>(stack[10]);
  const auto clipvalue = to<std::optional<double>>(stack[11]);
  const auto clipnorm = to<std::optional<double>>(stack[12]);
  const auto square_sums = to<OptionalTensor>(stack[13]);
  const auto factor_tensor = to<OptionalTensor>(stack[15]);
  const double lr = resolve(to<double>(stack[4]), lr_tensor, "lr");
  const double rho = resolve(to<double>(stack[5]), rho_tensor, "rho");
  const double epsilon = resolve(to<double>(stack[6]), epsilon_tensor, "epsilon");
  const double factor = resolve(to<double>(stack[14]), factor_tensor, "factor");
  const bool maximize = to<bool>(stack[7]);
  const Entries& lists = read_entries(params, grads, square_avgs, acc_deltas, aoti_torch_device_type_cpu());
  const bool has_factor = factor_tensor.has_value() || factor != 1;
  const Clip clip = read_clip(
      clipvalue,
      clipnorm,
      square_sums,
      has_factor ? std::optional(factor) : std::nullopt,
      maximize,
      params.size(),
      lists.complex_param
  );
  update_entries(lists, clip, {lr, rho, epsilon}, {lr, rho, epsilon});
}

// adadelta_.unclipped in ops.cpp.
void adadelta_unclipped(StableIValue* stack, uint64_t argument_count, uint64_t result_count) {
  StableIValue with_clip_options[16];
  StableIValue* options = std::copy_n(stack, 11, with_clip_options);
  *options++ = from(std::nullopt);  // clipvalue
  *options++ = from(std::nullopt);  // clipnorm
  *options++ = from(std::nullopt);  // square_sums
  *options++ = from(1.0);           // factor
  *options++ = from(std::nullopt);  // factor_tensor
  adadelta_(with_clip_options, argument_count, result_count);
}

// check_lists in ops.cpp: what adadelta_ checks, and nothing more.
void check_lists(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[0]), grads(stack[1]), square_avgs(stack[2]), acc_deltas(stack[3]);
  read_entries(params, grads, square_avgs, acc_deltas, aoti_torch_device_type_cpu());
}

}  // namespace
}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) {
  m.impl("adadelta_", torch_adadelta::cpu::adadelta_);
  m.impl("adadelta_.unclipped", torch_adadelta::cpu::adadelta_unclipped);
  m.impl("check_lists", torch_adadelta::cpu::check_lists);
}
