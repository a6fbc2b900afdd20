// The update by sparse gradients on the GPU: kernels, and below them what launches them. `Device` as in update.cuh.
//
// The COO entries of a gradient get the numbers of their rows, PyTorch sorts these, stably, and a few threads for each
// COO entry look whether it is the first of its row. If it is, they sum up the row's gradient, in the order in which
// its COO entries were given, and update the row. How many rows there are only the device knows, so nobody waits.
#pragma once

#include "../sparse.h"
#include "tables.h"
#include "update.cuh"

#include <torch/csrc/stable/ops.h>

#include <array>

namespace torch_adadelta::cuda {

// Small blocks, for a gradient may have few COO entries, and each waits for memory.
constexpr int kRowThreads = 128;

// The indices of one gradient.
struct NumberRows {
  Indices indices;
  int64_t size[kMaxDimensions];  // of the sparse dimensions
  int64_t rows;
  int64_t* numbers;                   // of the rows, `rows` where an index is out of range; or nullptr
  unsigned long long* first_invalid;  // lowered to the first COO entry whose index is out of range; or nullptr
};

// One parameter and its gradient, whose COO entries are in the order of their rows.
struct SparseUpdate {
  GradientOptions options;
  Segment segment;
  const int64_t* numbers;    // of the rows; those that are not of the parameter are last
  const int64_t* positions;  // of the COO entries in the gradient
  int64_t count;             // of COO entries
  int64_t rows;
  int64_t row_numel;
  int64_t pieces;  // that a row is cut into
  int lanes;       // threads for each piece, a power of two
  char* data[kTensors];
  uint32_t index;
  Dtype dtype[kTensors];
};

struct StridedSparseUpdate {
  SparseUpdate update;
  Strides<kTensors> strides;  // those of the gradient are 0
};

static_assert(sizeof(NumberRows) <= 4096 && sizeof(StridedSparseUpdate) <= 4096);

// ---- Kernels --------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) number_rows_kernel(const NumberRows __grid_constant__ table) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= table.indices.count) {
    return;
  }
  int64_t number = 0;
  bool is_bad = false;
  for (int64_t d = 0; d < table.indices.dims; ++d) {
    const int64_t index = table.indices.at(d, k);
    is_bad = is_bad || static_cast<uint64_t>(index) >= static_cast<uint64_t>(table.size[d]);
    number = is_bad ? 0 : number * table.size[d] + index;
  }
  if (table.numbers != nullptr) {
    table.numbers[k] = is_bad ? table.rows : number;
  }
  if (table.first_invalid != nullptr && is_bad) {
    atomicMin(table.first_invalid, static_cast<unsigned long long>(k));
  }
}

// Values that are asked for at a time.
constexpr int kCooEntriesAhead = 4;

// Which elements of which row a thread works on, if any.
struct Share {
  int64_t coo_entry;  // the first of the row
  int64_t row;
  int64_t column;
  bool has_work;

  __device__ __forceinline__ Share(const SparseUpdate& update, int width) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    const int64_t group = thread / update.lanes;
    coo_entry = group / update.pieces;
    column = ((group - coo_entry * update.pieces) * update.lanes + thread % update.lanes) * width;
    has_work = false;
    if (coo_entry < update.count && column < update.row_numel && !is_skipped(update.options)) {
      row = update.numbers[coo_entry];
      has_work = row < update.rows && (coo_entry == 0 || update.numbers[coo_entry - 1] != row);
    }
  }
};

// The sum of what the COO entries of a row have at a column and its neighbours.
template <int width, typename T, typename Values, typename Pipeline>
__device__ __forceinline__ void sum_coo_entries(
    T (&sum)[width], const SparseUpdate& update, const Share& share, const Values& values, const Pipeline& pipeline
) {
#pragma unroll
  for (int k = 0; k < width; ++k) {
    sum[k] = T(0);
  }
  bool goes_on = true;
  for (int64_t first = share.coo_entry; goes_on; first += kCooEntriesAhead) {
    T ahead[kCooEntriesAhead][width];
    bool belongs[kCooEntriesAhead];
#pragma unroll
    for (int j = 0; j < kCooEntriesAhead; ++j) {
      belongs[j] = first + j < update.count && update.numbers[first + j] == share.row;
      if (belongs[j]) {
        values.load(update.positions[first + j] * update.row_numel + share.column, ahead[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kCooEntriesAhead; ++j) {
      if (belongs[j]) {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          sum[k] = sum[k] + pipeline(ahead[j][k]);
        }
      }
    }
    goes_on = belongs[kCooEntriesAhead - 1];
  }
}

// A gradient that is summed up already.
template <typename T, int width>
struct Summed {
  const T (&sum)[width];

  __device__ __forceinline__ void load(int64_t, T (&g)[width]) const {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      g[k] = sum[k];
    }
  }
};

struct Unchanged {
  template <typename T>
  __device__ __forceinline__ T operator()(T g) const {
    return g;
  }
};

// A parameter whose rows follow each other in memory, as those of its state do. A thread takes `width` neighbours, to
// which all addresses are aligned.
template <typename StateItem, typename Param, int width>
__global__ void __launch_bounds__(kRowThreads, sizeof(StateItem) == 8 ? 4 : 8) update_rows_kernel(
    const SparseUpdate __grid_constant__ update
) {
  using Item = typename Param::Item;
  using State = Plain<StateItem>;
  using T = OpmathType<Item>;
  const Share share(update, width);
  if (!share.has_work) {
    return;
  }
  const GradientPipeline<T, false> pipeline(update.options, update.index, update.segment.maximize());
  T sum[width];
  if (update.dtype[kGrad] == kDtypeOfItem<Item>) {
    const SameDtype<Item> values{reinterpret_cast<const Item*>(update.data[kGrad])};
    sum_coo_entries(sum, update, share, values, pipeline);
  } else {
    const AnyDtype values{update.data[kGrad], update.dtype[kGrad]};
    sum_coo_entries(sum, update, share, values, pipeline);
  }
  update_vector<width>(
      Param(update.data[kParam], update.data[kRemainder], 0),
      Summed<T, width>{sum},
      State(update.data[kSquareAvg], nullptr, 0),
      State(update.data[kAccDelta], nullptr, 0),
      static_cast<const AverageUpdate<T>*>(nullptr),
      share.row * update.row_numel + share.column,
      Unchanged(),
      hyperparameters<T>(update.segment)
  );
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) update_strided_rows_kernel(
    const StridedSparseUpdate __grid_constant__ strided
) {
  const SparseUpdate& update = strided.update;
  const Share share(update, 1);
  if (!share.has_work) {
    return;
  }
  const GradientPipeline<T, false> pipeline(update.options, update.index, update.segment.maximize());
  T sum[1];
  sum_coo_entries(sum, update, share, AnyDtype{update.data[kGrad], update.dtype[kGrad]}, pipeline);
  int64_t offsets[kTensors];
  find_offsets(strided.strides, share.row * update.row_numel + share.column, offsets);
  update_item(sum[0], update.data, offsets, update.dtype, hyperparameters<T>(update.segment));
}

// ---- Launches -------------------------------------------------------------------------------------------------------

inline int64_t number_blocks(const SparseEntry& entry) { return (entry.indices.count + kThreads - 1) / kThreads; }

template <typename Device>
void number_rows(const Device& device, const SparseEntry& entry, int64_t* numbers, int64_t* first_invalid) {
  NumberRows table;
  table.indices = entry.indices;
  table.rows = entry.rows;
  table.numbers = numbers;
  table.first_invalid = reinterpret_cast<unsigned long long*>(first_invalid);
  for (size_t d = 0; d < entry.sparse_dims.size(); ++d) {
    table.size[d] = entry.sparse_dims[d].size;
  }
  if (entry.indices.count > 0) {
    device.launch(number_rows_kernel, number_blocks(entry), kThreads, table);
  }
}

// Sorts whole numbers, stably; returns them, and where each stood.
inline std::array<torch::stable::Tensor, 2> sorted(const torch::stable::Tensor& numbers) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{
      from(numbers), from(std::optional<bool>(true)), from(static_cast<int64_t>(-1)), from(false)
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<torch::stable::Tensor>(stack[0]), to<torch::stable::Tensor>(stack[1])};
}

template <typename Format, typename Device>
void update_rows(const Device& device, const SparseUpdate& update, int width, int64_t blocks) {
  using Param = typename Format::Param;
  using StateItem = typename Format::StateItem;
  constexpr int kWidth = kVectorBytes / sizeof(OpmathType<typename Param::Item>);
  device.launch(
      width == 1 ? update_rows_kernel<StateItem, Param, 1> : update_rows_kernel<StateItem, Param, kWidth>,
      blocks,
      kRowThreads,
      update
  );
}

// How a parameter with a sparse gradient is to be updated: the launch without the order of its COO entries.
class SparseLaunch {
 public:
  // Refuses what no launch can take.
  SparseLaunch(const SparseEntry& entry, const UpdateOptions& options) : entry_(entry), layout_(entry.sparse_dims) {
    update_.options = options.gradient;
    update_.segment = options.segments[entry.segment];
    update_.count = entry.indices.count;
    update_.rows = entry.rows;
    update_.row_numel = entry.row_numel;
    std::copy_n(entry.data, kTensors, update_.data);
    std::copy_n(entry.dtype, kTensors, update_.dtype);
    update_.index = static_cast<uint32_t>(entry.index);

    layout_.insert(layout_.end(), entry.row.begin(), entry.row.end());
    dense_ = detail::is_contiguous(layout_, entry);
    const int vector = entry.dtype[kParam] == Dtype::kFloat64 ? 2 : 4;
    bool vectors = dense_ && entry.row_numel % vector == 0;
    for (int slot = 0; slot < kTensors; ++slot) {
      const int64_t alignment = std::min<int64_t>(vector * item_size(entry.dtype[slot]), kVectorBytes);
      vectors = vectors && reinterpret_cast<uintptr_t>(entry.data[slot]) % alignment == 0;
    }
    width_ = vectors ? vector : 1;
    const int64_t per_row = entry.row_numel / width_;  // threads
    update_.lanes = 1;
    while (update_.lanes < kWarp && update_.lanes < per_row) {
      update_.lanes *= 2;
    }
    update_.pieces = (per_row + update_.lanes - 1) / update_.lanes;
    blocks_ = (update_.count * update_.pieces * update_.lanes + kRowThreads - 1) / kRowThreads;
    check_launch<0, kTensors>(entry.index, std::max(blocks_, number_blocks(entry)), dense_ ? nullptr : &layout_);
  }

  // Brings the COO entries into the order of their rows. Writes to memory of its own only.
  template <typename Device>
  void sort(const Device& device, const DeviceId& id) {
    const torch::stable::Tensor numbers = new_vector(entry_.indices.count, aoti_torch_dtype_int64(), id);
    number_rows(device, entry_, static_cast<int64_t*>(numbers.mutable_data_ptr()), nullptr);
    order_ = sorted(numbers);
    update_.numbers = static_cast<const int64_t*>((*order_)[0].const_data_ptr());
    update_.positions = static_cast<const int64_t*>((*order_)[1].const_data_ptr());
  }

  template <typename Device>
  void run(const Device& device) const {
    if (!dense_) {
      StridedSparseUpdate strided;
      strided.update = update_;
      copy_layout<0>(layout_, strided.strides);
      const bool in_double = entry_.dtype[kParam] == Dtype::kFloat64;
      device.launch(
          in_double ? update_strided_rows_kernel<double> : update_strided_rows_kernel<float>,
          blocks_,
          kRowThreads,
          strided
      );
      return;
    }
    for_each_format([&](auto format) {
      if (format.is_of(entry_)) {
        update_rows<decltype(format)>(device, update_, width_, blocks_);
      }
    });
  }

 private:
  const SparseEntry& entry_;
  Layout layout_;
  SparseUpdate update_;
  bool dense_;
  int width_;  // how many neighbours a thread takes
  int64_t blocks_;
  std::optional<std::array<torch::stable::Tensor, 2>> order_;
};

// sparse_adadelta_ in schemas.h. To raise for an index it would have to wait for the device: it leaves such an
// COO entry out, and first_invalid_indices tells.
template <typename Device>
void sparse_adadelta_(StableIValue* stack, uint64_t, uint64_t) {
  std::optional<SparseArguments> arguments;
  std::optional<Device> device;
  std::vector<SparseLaunch> launches;
  before_writing([&] {
    arguments.emplace(ArgumentReader(stack), Device::type());
    device.emplace(arguments->entries().device_index);
    for (const SparseEntry& entry : arguments->entries().entries) {
      if (entry.count() > 0) {
        launches.emplace_back(entry, arguments->options());
      }
    }
    if (!arguments->check_only()) {
      for (SparseLaunch& launch : launches) {
        launch.sort(*device, arguments->device());
      }
    }
  });
  if (!arguments->check_only()) {
    for (const SparseLaunch& launch : launches) {
      launch.run(*device);
    }
  }
}

// first_invalid_indices in schemas.h.
template <typename Device>
void first_invalid_indices(StableIValue* stack, uint64_t, uint64_t) {
  before_writing([&] {
    ArgumentReader reader(stack);
    const SparseLists lists(reader, Device::type());
    const SparseEntries entries = lists.read();
    for (const SparseEntry& entry : entries.entries) {
      check_launch<0, kTensors>(entry.index, number_blocks(entry), nullptr);
    }
    const Device device(entries.device_index);
    const torch::stable::Tensor result = lists.new_result(entries);
    torch::stable::fill_(result, -1);  // as an unsigned number the largest
    auto* positions = static_cast<int64_t*>(result.mutable_data_ptr());
    for (const SparseEntry& entry : entries.entries) {
      number_rows(device, entry, nullptr, positions + entry.index);
    }
    stack[0] = torch::stable::detail::from(result);
  });
}

}  // namespace torch_adadelta::cuda
