// The update by sparse gradients on the GPU: kernels, and below them what launches them. `Device` as in update.cuh.
//
// The occurrences of a gradient get the numbers of their rows, PyTorch sorts these, stably, and a few threads for each
// occurrence look whether it is the first of its row. If it is, they sum up the row's gradient, in the order in which
// its occurrences were given, and update the row. How many rows there are only the device knows, so nobody waits.
#pragma once

#include "../sparse.h"
#include "tables.h"
#include "update.cuh"

#include <torch/csrc/stable/ops.h>

#include <array>

namespace torch_adadelta::cuda {

// Small blocks, for a gradient may have few occurrences, and each waits for memory.
constexpr int kRowThreads = 128;

// The indices of one gradient.
struct NumberRows {
  Indices indices;
  int64_t size[kMaxDimensions];  // of the sparse dimensions
  int64_t rows;
  int64_t* numbers;               // of the rows, `rows` where an index is out of range; or nullptr
  unsigned long long* first_bad;  // lowered to the first occurrence whose index is out of range; or nullptr
};

// One parameter and its gradient, whose occurrences are in the order of their rows.
struct SparseUpdate {
  UpdateOptions options;
  const int64_t* numbers;    // of the rows; those that are not of the parameter are last
  const int64_t* positions;  // of the occurrences in the gradient
  int64_t count;             // of occurrences
  int64_t rows;
  int64_t row_numel;
  int64_t pieces;  // that a row is cut into
  int lanes;       // threads for each piece, a power of two
  char* param;
  char* square_avg;
  char* acc_delta;
  const char* values;
  uint32_t index;
  Dtype dtype;
  Dtype value_dtype;
};

// Strides are those of param, square_avg and acc_delta.
struct StridedSparseUpdate {
  SparseUpdate update;
  Strides<3> strides;
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
  if (table.first_bad != nullptr && is_bad) {
    atomicMin(table.first_bad, static_cast<unsigned long long>(k));
  }
}

// Values that are asked for at a time.
constexpr int kOccurrencesAhead = 4;

// Which elements of which row a thread works on, if any.
struct Share {
  int64_t occurrence;  // the first of the row
  int64_t row;
  int64_t column;
  bool has_work;

  __device__ __forceinline__ Share(const SparseUpdate& update, int width) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    const int64_t group = thread / update.lanes;
    occurrence = group / update.pieces;
    column = ((group - occurrence * update.pieces) * update.lanes + thread % update.lanes) * width;
    has_work = false;
    if (occurrence < update.count && column < update.row_numel && !is_skipped(update.options)) {
      row = update.numbers[occurrence];
      has_work = row < update.rows && (occurrence == 0 || update.numbers[occurrence - 1] != row);
    }
  }
};

// The sum of what the occurrences of a row have at a column and its neighbours.
template <int width, typename T, typename Values, typename Pipeline>
__device__ __forceinline__ void sum_occurrences(
    T (&sum)[width], const SparseUpdate& update, const Share& share, const Values& values, const Pipeline& pipeline
) {
#pragma unroll
  for (int k = 0; k < width; ++k) {
    sum[k] = T(0);
  }
  bool goes_on = true;
  for (int64_t first = share.occurrence; goes_on; first += kOccurrencesAhead) {
    T ahead[kOccurrencesAhead][width];
    bool belongs[kOccurrencesAhead];
#pragma unroll
    for (int j = 0; j < kOccurrencesAhead; ++j) {
      belongs[j] = first + j < update.count && update.numbers[first + j] == share.row;
      if (belongs[j]) {
        values.load(update.positions[first + j] * update.row_numel + share.column, ahead[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kOccurrencesAhead; ++j) {
      if (belongs[j]) {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          sum[k] = sum[k] + pipeline(ahead[j][k]);
        }
      }
    }
    goes_on = belongs[kOccurrencesAhead - 1];
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
template <typename Item, int width>
__global__ void __launch_bounds__(kRowThreads, sizeof(Item) == 8 ? 4 : 8) update_rows_kernel(
    const SparseUpdate __grid_constant__ update
) {
  using T = ArithmeticType<Item>;
  const Share share(update, width);
  if (!share.has_work) {
    return;
  }
  const GradientPipeline<T, false> pipeline(update.options, update.index);
  T sum[width];
  if (update.value_dtype == update.dtype) {
    const SameDtype<Item> values{reinterpret_cast<const Item*>(update.values)};
    sum_occurrences(sum, update, share, values, pipeline);
  } else {
    const AnyDtype values{update.values, update.value_dtype};
    sum_occurrences(sum, update, share, values, pipeline);
  }
  update_vector<width>(
      reinterpret_cast<Item*>(update.param),
      Summed<T, width>{sum},
      reinterpret_cast<Item*>(update.square_avg),
      reinterpret_cast<Item*>(update.acc_delta),
      share.row * update.row_numel + share.column,
      Unchanged(),
      hyperparameters<T>(update.options)
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
  const GradientPipeline<T, false> pipeline(update.options, update.index);
  T sum[1];
  sum_occurrences(sum, update, share, AnyDtype{update.values, update.value_dtype}, pipeline);
  int64_t offsets[3];
  find_offsets(strided.strides, share.row * update.row_numel + share.column, offsets);
  char* param = update.param + offsets[0];
  char* square_avg = update.square_avg + offsets[1];
  char* acc_delta = update.acc_delta + offsets[2];
  T a = load_item<T>(square_avg, update.dtype);
  T u = load_item<T>(acc_delta, update.dtype);
  T p = load_item<T>(param, update.dtype);
  adadelta_element(sum[0], a, u, p, hyperparameters<T>(update.options));
  store_item(square_avg, update.dtype, a);
  store_item(acc_delta, update.dtype, u);
  store_item(param, update.dtype, p);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <typename Device>
void number_rows(const Device& device, const SparseEntry& entry, int64_t* numbers, int64_t* first_bad) {
  NumberRows table;
  table.indices = entry.indices;
  table.rows = entry.rows;
  table.numbers = numbers;
  table.first_bad = reinterpret_cast<unsigned long long*>(first_bad);
  for (size_t d = 0; d < entry.sparse_dims.size(); ++d) {
    table.size[d] = entry.sparse_dims[d].size;
  }
  const int64_t blocks = (entry.indices.count + kThreads - 1) / kThreads;
  if (blocks > kMaxBlocks) {
    fail("a gradient has more occurrences than one launch can take");
  }
  if (blocks > 0) {
    device.launch(number_rows_kernel, blocks, kThreads, table);
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

template <typename Item, typename Device>
void update_rows(const Device& device, SparseUpdate& update, int width, int64_t blocks) {
  constexpr int kWidth = kVectorBytes / sizeof(ArithmeticType<Item>);
  device.launch(
      width == 1 ? update_rows_kernel<Item, 1> : update_rows_kernel<Item, kWidth>, blocks, kRowThreads, update
  );
}

template <typename Device>
void update_sparse(
    const Device& device, const SparseEntry& entry, const detail::Place& place, const UpdateOptions& options
) {
  const torch::stable::Tensor numbers = new_vector(entry.indices.count, aoti_torch_dtype_int64(), place);
  number_rows(device, entry, static_cast<int64_t*>(numbers.mutable_data_ptr()), nullptr);
  const auto [in_order, positions] = sorted(numbers);

  SparseUpdate update;
  update.options = options;
  update.numbers = static_cast<const int64_t*>(in_order.const_data_ptr());
  update.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  update.count = entry.indices.count;
  update.rows = entry.rows;
  update.row_numel = entry.row_numel;
  update.param = entry.param;
  update.square_avg = entry.square_avg;
  update.acc_delta = entry.acc_delta;
  update.values = entry.values;
  update.index = static_cast<uint32_t>(entry.index);
  update.dtype = entry.dtype;
  update.value_dtype = entry.value_dtype;

  Layout layout = entry.sparse_dims;
  layout.insert(layout.end(), entry.row.begin(), entry.row.end());
  const bool dense = detail::is_contiguous(layout, entry.dtype);
  const int vector = entry.dtype == Dtype::kFloat64 ? 2 : 4;
  const auto fits = [&](const char* data, Dtype dtype) {
    return reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(vector * item_size(dtype), kVectorBytes) == 0;
  };
  const bool vectors = dense && entry.row_numel % vector == 0 && fits(entry.param, entry.dtype) &&
                       fits(entry.square_avg, entry.dtype) && fits(entry.acc_delta, entry.dtype) &&
                       fits(entry.values, entry.value_dtype);
  const int width = vectors ? vector : 1;
  const int64_t per_row = entry.row_numel / width;  // threads
  update.lanes = 1;
  while (update.lanes < kWarp && update.lanes < per_row) {
    update.lanes *= 2;
  }
  update.pieces = (per_row + update.lanes - 1) / update.lanes;
  const int64_t blocks = (update.count * update.pieces * update.lanes + kRowThreads - 1) / kRowThreads;
  if (blocks > kMaxBlocks) {
    fail("the gradient of parameter ", entry.index, " has more elements than one launch can take");
  }

  if (!dense) {
    StridedSparseUpdate strided;
    strided.update = update;
    copy_layout<&Dimension::param, &Dimension::square_avg, &Dimension::acc_delta>(layout, strided.strides);
    const bool in_double = entry.dtype == Dtype::kFloat64;
    device.launch(
        in_double ? update_strided_rows_kernel<double> : update_strided_rows_kernel<float>, blocks, kRowThreads, strided
    );
    return;
  }
  switch (entry.dtype) {
    case Dtype::kFloat32:
      return update_rows<float>(device, update, width, blocks);
    case Dtype::kFloat64:
      return update_rows<double>(device, update, width, blocks);
    case Dtype::kFloat16:
      return update_rows<__half>(device, update, width, blocks);
    case Dtype::kBFloat16:
      return update_rows<__nv_bfloat16>(device, update, width, blocks);
  }
}

// sparse_adadelta_ in schemas.h. To raise for an index it would have to wait for the device: it leaves such an
// occurrence out, and first_bad_indices tells.
template <typename Device>
void sparse_adadelta_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  const SparseLists lists(stack, Device::type());
  const OptionArguments given(stack, argument_count, 5);
  const SparseEntries entries = lists.read();
  const detail::Place place = lists.place(entries);
  const UpdateOptions options = given.read(place, lists.size(), entries.complex_param);
  check_values(entries);
  const Device device(entries.device_index);
  for (const SparseEntry& entry : entries.entries) {
    if (entry.count() > 0) {
      update_sparse(device, entry, place, options);
    }
  }
}

// first_bad_indices in schemas.h.
template <typename Device>
void first_bad_indices(StableIValue* stack, uint64_t, uint64_t) {
  const SparseLists lists(stack, Device::type());
  const SparseEntries entries = lists.read();
  const Device device(entries.device_index);
  const torch::stable::Tensor result = lists.new_result(entries);
  torch::stable::fill_(result, -1);  // as an unsigned number the largest
  auto* positions = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const SparseEntry& entry : entries.entries) {
    number_rows(device, entry, nullptr, positions + entry.index);
  }
  stack[0] = torch::stable::detail::from(result);
}

}  // namespace torch_adadelta::cuda
