// The dense update on the CPU: all threads share the elements of all parameters of a call, as one row.
#include "accumulator_cache.h"
#include "blocks.h"
#include "parallel.h"
#include "segments.h"

#include "../options.h"

namespace torch_adadelta::cpu {
namespace {

// ---- One parameter --------------------------------------------------------------------------------------------------

// The elements [begin, end) of one parameter, in the order of its memory, block by block. T is the opmath dtype.
//
// Not inlined, for the buffers would be set up for each small parameter that needs none.
template <typename T>
__attribute__((noinline)) void update_by_blocks(
    const KernelTable& kernels,
    const Entry& entry,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  alignas(64) T blocks[kTensors][kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    for_each_slot([&](auto slot) {
      load_block<slot>(kernels, blocks[slot], entry.data[slot], entry.dtype[slot], entry.layout, at, count);
    });
    kernels.in<T>().update(blocks[kParam], blocks[kGrad], blocks[kSquareAvg], blocks[kAccDelta], count, clip, h);
    for_each_slot([&](auto slot) {
      if constexpr (is_written(slot)) {
        store_block<slot>(kernels, entry.data[slot], entry.dtype[slot], blocks[slot], entry.layout, at, count);
      }
    });
  }
}

// The same, in place where that is possible.
template <typename T>
void update_range(
    const KernelTable& kernels,
    const Entry& entry,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  if (entry.layout != nullptr || entry.dtype[kGrad] != entry.dtype[kParam]) {
    return update_by_blocks(kernels, entry, begin, end, clip, h);
  }
  const auto update_in_place = [&](auto loop, auto* param) {
    using Item = std::remove_pointer_t<decltype(param)>;
    loop(
        param + begin,
        reinterpret_cast<const Item*>(entry.data[kGrad]) + begin,
        reinterpret_cast<Item*>(entry.data[kSquareAvg]) + begin,
        reinterpret_cast<Item*>(entry.data[kAccDelta]) + begin,
        end - begin,
        clip,
        h
    );
  };
  if constexpr (std::is_same_v<T, float>) {
    if (entry.dtype[kParam] == Dtype::kFloat16) {
      return update_in_place(kernels.update_half, reinterpret_cast<uint16_t*>(entry.data[kParam]));
    }
    if (entry.dtype[kParam] == Dtype::kBFloat16) {
      return update_in_place(kernels.update_bfloat16, reinterpret_cast<uint16_t*>(entry.data[kParam]));
    }
  }
  update_in_place(kernels.in<T>().update, reinterpret_cast<T*>(entry.data[kParam]));
}

// ---- The ops --------------------------------------------------------------------------------------------------------

// All that an update allocates. Made before anything is written, and run after that.
class Update {
 public:
  Update(const Workspace& workspace, const UpdateOptions& options)
      : workspace_(workspace), options_(options.gradient), values_(options), pieces_(workspace.numel()) {}

  void run() {
    if (is_skipped(options_)) {
      return;
    }
    const KernelTable& kernels = current_kernels();
    for_all_elements(
        workspace_.entries, workspace_.disjoint, pieces_, [&](const Entry& entry, int64_t begin, int64_t end) {
          values_.with_values(
              entry.dtype[kParam], entry.segment, entry.index, [&](const auto& clip, const auto& hyperparameters) {
                update_range(kernels, entry, begin, end, clip, hyperparameters);
              }
          );
        }
    );
  }

 private:
  const Workspace& workspace_;
  const GradientOptions& options_;
  SegmentValues values_;
  ParallelPieces pieces_;
};

template <typename Arguments, typename... Parts>
void run(Parts&&... parts) {
  std::optional<Arguments> arguments;
  std::optional<Update> update;
  before_writing([&] {
    arguments.emplace(parts...);
    update.emplace(arguments->workspace(), arguments->options());
  });
  if (!arguments->check_only()) {
    update->run();
  }
}

// adadelta_ in schemas.h. Boxed, so that each list is read in place instead of becoming a vector of tensor objects.
void adadelta_(StableIValue* stack, uint64_t, uint64_t) {
  static thread_local Workspace workspace;
  run<UpdateArguments>(ArgumentReader(stack), workspace, aoti_torch_device_type_cpu());
}

// adadelta_.cached in ops.cpp.
void adadelta_cached(StableIValue* stack, uint64_t, uint64_t) { run<CachedUpdateArguments>(ArgumentReader(stack)); }

}  // namespace
}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) {
  m.impl("adadelta_", torch_adadelta::cpu::adadelta_);
  m.impl("adadelta_.cached", torch_adadelta::cpu::adadelta_cached);
}
