// Sparse gradients as the ops receive them: the dense parts of COO tensors. A gradient has `count` occurrences; an
// occurrence names a row of its parameter by a column of `indices` and holds what is to be added to the gradient of
// that row in `values`. This header reads and checks them, for any device.
//
// A row of a parameter [s0, s1, …, d0, d1, …] is what an index into its sparse dimensions s0, s1, … selects. Rows are
// numbered in the order of those dimensions, the last one fastest.
#pragma once

#include "adadelta.h"
#include "arguments.h"
#include "tensor_lists.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torch_adadelta {

// The indices of one gradient, [sparse dimensions, occurrences] of int64.
struct Indices {
  const int64_t* data;
  int64_t dims;
  int64_t count;
  int64_t dim_stride;
  int64_t count_stride;

  // From the first of them in memory to the end of the last.
  int64_t bytes() const {
    if (dims == 0 || count == 0) {
      return 0;
    }
    return ((dims - 1) * dim_stride + (count - 1) * count_stride + 1) * static_cast<int64_t>(sizeof(int64_t));
  }

  ADADELTA_INLINE int64_t at(int64_t dim, int64_t occurrence) const {
    return data[dim * dim_stride + occurrence * count_stride];
  }
};

// One parameter with a sparse gradient, ready to be updated.
struct SparseEntry {
  char* param;
  char* square_avg;
  char* acc_delta;
  const char* values;  // [occurrences, row_numel]
  Indices indices;
  Layout sparse_dims;   // of the parameter, with their strides in param, square_avg and acc_delta
  Layout row;           // the dimensions of a row, in their order; the last may be the parts of a complex number
  int64_t rows;         // of the parameter
  int64_t row_numel;    // of real numbers
  bool contiguous_row;  // in param, square_avg and acc_delta
  Dtype dtype;          // of param, square_avg and acc_delta
  Dtype value_dtype;
  bool contiguous_values;
  size_t index;  // of the parameter in the lists

  int64_t count() const { return row_numel == 0 ? 0 : indices.count; }
};

struct SparseEntries : InCommon {
  std::vector<SparseEntry> entries;  // one for each parameter
};

namespace detail {

// Memory [begin, end) of a tensor of parameter `index`.
struct IndexedRange {
  const char* begin;
  const char* end;
  size_t index;
};

// Throws if some indices share memory with what is written: once they were overwritten, they would name any row.
inline void check_indices_apart(std::vector<IndexedRange>& written, const std::vector<IndexedRange>& indices) {
  std::sort(written.begin(), written.end(), [](const IndexedRange& x, const IndexedRange& y) {
    return x.begin < y.begin;
  });
  for (size_t i = 1; i < written.size(); ++i) {  // the furthest end so far, for ranges may overlap
    written[i].end = std::max(written[i].end, written[i - 1].end);
  }
  for (const IndexedRange& range : indices) {
    const auto after = std::lower_bound(
        written.begin(), written.end(), range.end, [](const IndexedRange& x, const char* end) { return x.begin < end; }
    );
    if (after != written.begin() && (after - 1)->end > range.begin) {
      fail("the indices of parameter ", range.index, " share memory with a tensor that would be written to");
    }
  }
}

inline Indices read_indices(AtenTensorHandle handle, const Place& place, size_t i) {
  int32_t layout = 0, dtype = 0, device_type = 0, device_index = 0;
  int64_t dim = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  if (device_type != aoti_torch_device_type_cpu()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  }
  if (layout != aoti_torch_layout_strided() || dtype != aoti_torch_dtype_int64() || dim != 2) {
    fail("indices[", i, "] is not a dense matrix of int64");
  }
  if (device_type != place.device_type || device_index != place.device_index) {
    fail("the tensors of parameter ", i, " are not on one device");
  }
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  const void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
  int64_t offset = 0, bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  const Indices indices{static_cast<const int64_t*>(data), sizes[0], sizes[1], strides[0], strides[1]};
  if (offset * static_cast<int64_t>(sizeof(int64_t)) + indices.bytes() > bytes) {
    fail("indices[", i, "] reaches beyond its memory: its storage was resized");
  }
  return indices;
}

// Whether some dimensions of a parameter follow each other in memory, without gaps, and those of its state do, too.
inline bool is_contiguous(const Layout& layout, Dtype dtype) {
  int64_t expected = item_size(dtype);
  for (auto dim = layout.rbegin(); dim != layout.rend(); ++dim) {
    if (dim->size != 1) {
      if (dim->param != expected || dim->square_avg != expected || dim->acc_delta != expected) {
        return false;
      }
      expected *= dim->size;
    }
  }
  return true;
}

}  // namespace detail

// Checks that each parameter can be updated with its gradient on `device_type`, but for the range of the indices, and
// describes it. Throws std::runtime_error before anything is written.
inline SparseEntries read_sparse_entries(
    const TensorList& params,
    const TensorList& indices,
    const TensorList& values,
    const TensorList& square_avgs,
    const TensorList& acc_deltas,
    int32_t device_type
) {
  check_lengths({
      {params.size(), "params"},
      {indices.size(), "indices"},
      {values.size(), "values"},
      {square_avgs.size(), "square_avgs"},
      {acc_deltas.size(), "acc_deltas"},
  });
  SparseEntries result;
  std::vector<detail::IndexedRange> written_to, read_indices;
  CallMemory memory;
  memory.begin();
  std::vector<size_t> index_of_row;
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorInfo param = params.info(i, "params", true);
    const TensorInfo value = values.info(i, "values", false);
    const TensorInfo square_avg = square_avgs.info(i, "square_avgs", true);
    const TensorInfo acc_delta = acc_deltas.info(i, "acc_deltas", true);
    params.check_storage(i, "params", param);
    values.check_storage(i, "values", value);
    square_avgs.check_storage(i, "square_avgs", square_avg);
    acc_deltas.check_storage(i, "acc_deltas", acc_delta);
    const detail::Written written{&param, &square_avg, &acc_delta};
    for (const TensorInfo* tensor : written) {
      detail::check_fits(param, *tensor, device_type, i);
      if (param.numel > 0) {
        written_to.push_back({tensor->data, tensor->data + tensor->bytes, i});
      }
    }
    result.add(param, i);
    detail::check_state_dtype(written, i);
    detail::check_device(param, value, device_type, i);
    detail::check_complex(param, value, i);

    SparseEntry entry{};
    entry.indices = detail::read_indices(indices[i], {device_type, param.device_index}, i);
    const int64_t sparse_dims = entry.indices.dims;
    if (entry.indices.bytes() > 0) {
      const auto* begin = reinterpret_cast<const char*>(entry.indices.data);
      read_indices.push_back({begin, begin + entry.indices.bytes(), i});
    }
    if (sparse_dims > param.dim || value.dim != 1 + param.dim - sparse_dims || value.sizes[0] != entry.indices.count ||
        !std::equal(value.sizes + 1, value.sizes + value.dim, param.sizes + sparse_dims)) {
      fail("the indices and values of parameter ", i, " do not make a gradient of its shape");
    }

    entry.rows = entry.row_numel = 1;
    for (int64_t d = 0; d < param.dim; ++d) {
      (d < sparse_dims ? entry.rows : entry.row_numel) *= param.sizes[d];
      (d < sparse_dims ? entry.sparse_dims : entry.row)
          .push_back(
              {param.sizes[d],
               param.strides[d] * element_size(param),
               0,
               square_avg.strides[d] * element_size(square_avg),
               acc_delta.strides[d] * element_size(acc_delta)}
          );
    }
    if (param.is_complex) {
      const int64_t size = item_size(param.dtype);
      entry.row.push_back({2, size, 0, size, size});
      entry.row_numel *= 2;
    }
    entry.contiguous_row = detail::is_contiguous(entry.row, param.dtype);
    if (param.numel > 0) {
      detail::check_no_overlap(written, i);
      detail::check_apart(written, i);
      for (const TensorInfo* tensor : written) {
        if (value.numel > 0) {
          detail::check_apart(*tensor, value, i);
        }
      }
      memory.add({{memory_of(param), memory_of(square_avg), memory_of(acc_delta)}, memory_of(value)});
      index_of_row.push_back(i);
    }
    entry.param = param.data;
    entry.values = value.data;
    entry.square_avg = square_avg.data;
    entry.acc_delta = acc_delta.data;
    entry.dtype = param.dtype;
    entry.value_dtype = value.dtype;
    entry.contiguous_values = value.numel == 0 || detail::is_contiguous(value);
    entry.index = i;
    result.entries.push_back(std::move(entry));
  }
  detail::check_indices_apart(written_to, read_indices);
  memory.finish([&](size_t row) { return index_of_row[row]; });
  return result;
}

// Throws unless the values are as the kernels read them.
inline void check_values(const SparseEntries& entries) {
  for (const SparseEntry& entry : entries.entries) {
    if (!entry.contiguous_values) {
      fail("the values of parameter ", entry.index, " are not contiguous");
    }
  }
}

// Owns what the dispatcher handed over to sparse_adadelta_, or the lists of it to first_bad_indices.
class SparseLists {
 public:
  SparseLists(StableIValue* stack, int32_t device_type)
      : params_(stack[0]),
        indices_(stack[1]),
        values_(stack[2]),
        square_avgs_(stack[3]),
        acc_deltas_(stack[4]),
        device_type_(device_type) {}
  SparseLists(const SparseLists&) = delete;
  SparseLists& operator=(const SparseLists&) = delete;

  size_t size() const { return params_.size(); }

  SparseEntries read() const {
    return read_sparse_entries(params_, indices_, values_, square_avgs_, acc_deltas_, device_type_);
  }

  detail::Place place(const SparseEntries& entries) const { return {device_type_, entries.device_index}; }

  // One uninitialised int64 for each parameter.
  torch::stable::Tensor new_result(const SparseEntries& entries) const {
    return new_vector(static_cast<int64_t>(size()), aoti_torch_dtype_int64(), place(entries));
  }

 private:
  TensorList params_, indices_, values_, square_avgs_, acc_deltas_;
  int32_t device_type_;
};

}  // namespace torch_adadelta
