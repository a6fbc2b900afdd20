// The dense update on the CPU: all threads share the elements of all parameters of a call, as one row.
#include "blocks.h"
#include "held_state.h"
#include "loops.h"
#include "options.h"
#include "parallel.h"

#include "../arguments.h"

#include <torch/csrc/stable/ops.h>

namespace torch_adadelta::cpu {
namespace {

// ---- One parameter --------------------------------------------------------------------------------------------------

template <typename T>
auto update_loop(const Loops& loops) {
  if constexpr (std::is_same_v<T, float>) {
    return loops.update_float;
  } else {
    return loops.update_double;
  }
}

// The elements [begin, end) of one parameter, in the order of its memory, block by block. T is the arithmetic type.
//
// Not inlined, for the buffers would be set up for each small parameter that needs none.
template <typename T>
__attribute__((noinline)) void update_by_blocks(
    const Loops& loops,
    const Entry& entry,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  alignas(64) T grad[kBlock], param[kBlock], square_avg[kBlock], acc_delta[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    load_block<&Dimension::grad>(loops, grad, entry.grad, entry.grad_dtype, entry.layout, at, count);
    load_block<&Dimension::param>(loops, param, entry.param, entry.dtype, entry.layout, at, count);
    load_block<&Dimension::square_avg>(loops, square_avg, entry.square_avg, entry.dtype, entry.layout, at, count);
    load_block<&Dimension::acc_delta>(loops, acc_delta, entry.acc_delta, entry.dtype, entry.layout, at, count);
    update_loop<T>(loops)(param, grad, square_avg, acc_delta, count, clip, h);
    store_block<&Dimension::param>(loops, entry.param, entry.dtype, param, entry.layout, at, count);
    store_block<&Dimension::square_avg>(loops, entry.square_avg, entry.dtype, square_avg, entry.layout, at, count);
    store_block<&Dimension::acc_delta>(loops, entry.acc_delta, entry.dtype, acc_delta, entry.layout, at, count);
  }
}

// The same, in place where that is possible.
template <typename T>
void update_range(
    const Loops& loops,
    const Entry& entry,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  if (entry.layout != nullptr || entry.grad_dtype != entry.dtype || entry.grad_aliases_param) {
    return update_by_blocks(loops, entry, begin, end, clip, h);
  }
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
  update_in_place(update_loop<T>(loops), reinterpret_cast<T*>(entry.param));
}

// ---- The ops --------------------------------------------------------------------------------------------------------

void update_entries(const Entries& lists, const UpdateOptions& options) {
  if (is_skipped(options)) {
    return;
  }
  const double lr = value_of(options.lr), rho = value_of(options.rho), epsilon = value_of(options.epsilon);
  const Hyperparameters<float> in_float(lr, rho, epsilon);
  const Hyperparameters<double> in_double(lr, rho, epsilon);
  const double factor = value_of(options.factor);
  const Loops& loops = current_loops();
  const auto update_entry = [&](const Entry& entry, int64_t begin, int64_t end) {
    if (entry.dtype == Dtype::kFloat64) {
      update_range(loops, entry, begin, end, clip_of<double>(options, entry.index, factor), in_double);
    } else {
      update_range(loops, entry, begin, end, clip_of<float>(options, entry.index, factor), in_float);
    }
  };
  const auto& entries = lists.entries;

  if (!lists.disjoint) {
    for (const Entry& entry : entries) {
      parallel_pieces(entry.numel, [&](int64_t begin, int64_t end) { update_entry(entry, begin, end); });
    }
    return;
  }

  parallel_pieces(lists.numel(), [&](int64_t begin, int64_t end) {
    auto entry = std::upper_bound(entries.begin(), entries.end(), begin, [](int64_t position, const Entry& e) {
      return position < e.end;
    });
    for (; begin < end; ++entry) {
      const int64_t start = entry->end - entry->numel;
      const int64_t stop = std::min(end, entry->end);
      update_entry(*entry, begin - start, stop - start);
      begin = stop;
    }
  });
}

// adadelta_ in schemas.h, and adadelta_.unclipped, whose arguments are the first of those. Boxed, so that each list is
// read in place instead of becoming a vector of tensor objects.
void adadelta_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  const UpdateArguments arguments(stack, argument_count, aoti_torch_device_type_cpu());
  update_entries(arguments.entries(), arguments.options());
}

// adadelta_.held_with_options in ops.cpp, and adadelta_.held, whose arguments are the first of those.
void adadelta_held(StableIValue* stack, uint64_t argument_count, uint64_t) {
  std::optional<HeldGil> gil;  // before what is destroyed while it is held
  const TensorList params(stack[0]), grads(stack[1]);
  const OptionArguments given(stack, argument_count, 3);
  const auto state = held_state(torch::stable::detail::to<int64_t>(stack[2]));
  const Entries& entries = state->read(params, grads);
  const detail::Place place{aoti_torch_device_type_cpu(), entries.device_index};
  update_entries(entries, given.read(place, params.size(), entries.complex_param));
  gil.emplace();
}

// check_lists in schemas.h: what adadelta_ checks, and nothing more.
void check_lists(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[0]), grads(stack[1]), square_avgs(stack[2]), acc_deltas(stack[3]);
  read_entries(params, grads, square_avgs, acc_deltas, aoti_torch_device_type_cpu());
}

}  // namespace
}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) {
  m.impl("adadelta_", torch_adadelta::cpu::adadelta_);
  m.impl("adadelta_.unclipped", torch_adadelta::cpu::adadelta_);
  m.impl("adadelta_.held", torch_adadelta::cpu::adadelta_held);
  m.impl("adadelta_.held_with_options", torch_adadelta::cpu::adadelta_held);
  m.impl("check_lists", torch_adadelta::cpu::check_lists);
}
