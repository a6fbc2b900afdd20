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
  const bool has_average = entry.data[kAverage] != nullptr;
  constexpr int kBlocks = kRemainder;  // which becomes a part of the parameter's
  alignas(64) T blocks[kBlocks][kBlock];
  char* data[kTensors] = {};
  for (int slot = 0; slot < kBlocks; ++slot) {
    data[slot] = reinterpret_cast<char*>(blocks[slot]);
  }
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const auto load = [&](auto slot) {
      load_block<slot>(kernels, blocks[slot], entry.data, entry.dtype, entry.layout, at, count);
    };
    const auto store = [&](auto slot) {
      store_block<slot>(kernels, entry.data, entry.dtype, blocks[slot], entry.layout, at, count);
    };
    for_each_slot<kBlocks>([&](auto slot) {
      if (slot != kAverage || has_average) {
        load(slot);
      }
    });
    kernels.update<T>()(data, 0, count, clip, h);
    for_each_slot<kBlocks>([&](auto slot) {
      if constexpr (is_written(slot) && slot != kAverage) {
        store(slot);
      }
    });
    if (has_average) {
      constexpr std::integral_constant<int, kParam> param{};
      constexpr std::integral_constant<int, kAverage> average{};
      load(param);  // as it was rounded
      kernels.average<T>()(data, 0, count, h);
      store(average);
      if (h.overwrites) {
        store(param);
      }
    }
  }
}

// Elements of a parameter that are updated before the average follows them: what the update has written of them is
// still in cache. Of 2048, 4096 and 8192 the first takes the least time, by up to a twentieth.
constexpr int64_t kStretch = 2048;

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
  const auto param_dtype = static_cast<int>(entry.dtype[kParam]);
  const int format = entry.data[kRemainder] != nullptr ? kMaster : param_dtype;
  const auto update = kernels.in<T>().updates[format][static_cast<int>(entry.dtype[kFirstState])];
  if (entry.layout != nullptr || entry.dtype[kGrad] != entry.dtype[kParam] || update == nullptr) {
    return update_by_blocks(kernels, entry, begin, end, clip, h);
  }
  if (entry.data[kAverage] == nullptr) {
    return update(entry.data, begin, end - begin, clip, h);
  }
  for (int64_t at = begin; at < end; at += kStretch) {
    const int64_t count = std::min(kStretch, end - at);
    update(entry.data, at, count, clip, h);
    kernels.in<T>().averages[format](entry.data, at, count, h);
  }
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
