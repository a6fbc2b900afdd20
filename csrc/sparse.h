// Sparse gradients as the ops receive them: the dense parts of COO tensors. A gradient has `count` COO entries; one
// names a row of its parameter by a column of `indices`, and holds in `values` what is to be added to the gradient of
// that row. This header reads and checks them, for any device.
//
// A row of a parameter [s0, s1, …, d0, d1, …] is what an index into its sparse dimensions s0, s1, … selects. Rows are
// numbered in the order of those dimensions, the last one fastest.
#pragma once

#include "adadelta.h"
#include "options.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torch_adadelta {

// The indices of one gradient, [sparse dimensions, COO entries] of int64.
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

  ADADELTA_INLINE int64_t at(int64_t dim, int64_t coo_entry) const {
    return data[dim * dim_stride + coo_entry * count_stride];
  }
};

// One parameter with a sparse gradient, ready to be updated.
struct SparseEntry {
  char* data[kTensors];  // that of the gradient: its values, [COO entries, row_numel]; nullptr where there is none
  Indices indices;
  Layout sparse_dims;     // of the parameter and its state, with their strides
  Layout row;             // the dimensions of a row, in their order; the last may be the parts of a complex number
  int64_t rows;           // of the parameter
  int64_t row_numel;      // of real numbers
  bool contiguous_row;    // in the parameter and its state
  Dtype dtype[kTensors];  // one for all state
  bool contiguous_values;
  uint32_t segment;
  size_t index;  // of the parameter in the lists

  int64_t count() const { return row_numel == 0 ? 0 : indices.count; }
};

struct SparseEntries : CallInfo {
  std::vector<SparseEntry> entries;  // one for each parameter
  bool disjoint = true;              // as in a Workspace
};

namespace detail {

// Memory [begin, end) of a tensor of parameter `index`.
struct IndexedRange {
  const char* begin;
  const char* end;
  size_t index;
};

// Refuses indices that share memory with what is written: once they were overwritten, they would name any row.
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
      refuse(range.index, "its indices share memory with a tensor that would be written to");
    }
  }
}

inline Indices read_indices(AtenTensorHandle handle, const DeviceId& device, size_t i) {
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
    refuse(i, "its indices are not a dense matrix of int64");
  }
  if (device_type != device.device_type || device_index != device.device_index) {
    refuse(i, "its tensors are not on one device");
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
    refuse(i, "the memory of its indices ends before them: its storage was resized");
  }
  return indices;
}

// Whether some dimensions of a parameter follow each other in memory, without gaps, and those of its state do, too.
inline bool is_contiguous(const Layout& layout, const SparseEntry& entry) {
  int64_t expected = 1;
  for (auto dim = layout.rbegin(); dim != layout.rend(); ++dim) {
    if (dim->size == 1) {
      continue;
    }
    for (int slot = 0; slot < kTensors; ++slot) {
      if (is_written(slot) && entry.data[slot] != nullptr &&
          dim->stride[slot] != expected * item_size(entry.dtype[slot])) {
        return false;
      }
    }
    expected *= dim->size;
  }
  return true;
}

}  // namespace detail

// Checks that each parameter can be updated with its gradient on `device_type`, but for the range of the indices, and
// describes it. The gradients of `lists` are the values. `formats`: of each segment, or nullptr, as in
// check_state_dtype.
inline SparseEntries read_sparse_entries(
    const Lists<TensorList>& lists,
    const TensorList& indices,
    const std::vector<int64_t>& sizes,
    const StateFormat* formats,
    int32_t device_type
) {
  const TensorList& params = lists.params;
  std::pair<size_t, const char*> lengths[1 + kTensors] = {
      {params.size(), "params"},
      {indices.size(), "indices"},
      {lists.grads.size(), "values"},
      {lists.states[0].size(), kListNames[kFirstState]},
      {lists.states[1].size(), kListNames[kFirstState + 1]},
  };
  size_t used = 1 + kFirstOptional;
  lists.for_each_optional([&](Slot slot, const TensorList& list) {
    lengths[used++] = {list.size(), kListNames[slot]};
  });
  check_lengths(lengths, used);
  check_sizes(sizes, params.size());
  SegmentCursor segments(sizes);
  SparseEntries result;
  std::vector<detail::IndexedRange> written_to, read_indices;
  AliasChecker aliases;
  aliases.begin();
  std::vector<size_t> index_of_row;
  for (size_t i = 0; i < params.size(); ++i) {
    std::array<TensorInfo, kTensors> storage;
    const TensorRow tensors = lists.row(i, storage);
    const TensorInfo &param = *tensors[kParam], &value = *tensors[kGrad];
    lists.check_storage(i);
    lists.grads.check_storage(i, kOwnNames[kGrad], value);
    for (int slot = 0; slot < kTensors; ++slot) {
      if (is_written(slot) && tensors[slot] != nullptr) {
        detail::check_fits(param, *tensors[slot], device_type, i);
        if (param.numel > 0) {
          written_to.push_back({tensors[slot]->data, tensors[slot]->data + tensors[slot]->bytes, i});
        }
      }
    }
    result.add(param, i);
    const uint32_t segment = segments.segment_of(i);
    const StateFormat* format = formats == nullptr ? nullptr : &formats[segment];
    detail::check_state_dtype(tensors, format, i);
    detail::check_remainder(tensors, format, i);
    detail::check_device(param, value, device_type, i);
    detail::check_complex(param, value, i);

    SparseEntry& entry = result.entries.emplace_back();
    entry.indices = detail::read_indices(indices[i], {device_type, param.device_index}, i);
    const int64_t sparse_dims = entry.indices.dims;
    if (entry.indices.bytes() > 0) {
      const auto* begin = reinterpret_cast<const char*>(entry.indices.data);
      read_indices.push_back({begin, begin + entry.indices.bytes(), i});
    }
    if (sparse_dims > param.dim || value.dim != 1 + param.dim - sparse_dims || value.sizes[0] != entry.indices.count ||
        !std::equal(value.sizes + 1, value.sizes + value.dim, param.sizes + sparse_dims)) {
      refuse(i, "its indices and values do not make a gradient of its shape");
    }

    RowMemory memory{};
    for (int slot = 0; slot < kTensors; ++slot) {
      if (tensors[slot] != nullptr) {
        entry.data[slot] = tensors[slot]->data;
        entry.dtype[slot] = tensors[slot]->dtype;
        memory[slot] = memory_of(*tensors[slot]);
      }
    }
    entry.rows = entry.row_numel = 1;
    for (int64_t d = 0; d < param.dim; ++d) {
      (d < sparse_dims ? entry.rows : entry.row_numel) *= param.sizes[d];
      Dimension& dim = (d < sparse_dims ? entry.sparse_dims : entry.row).emplace_back();
      dim.size = param.sizes[d];
      for (int slot = 0; slot < kTensors; ++slot) {
        const TensorInfo* tensor = is_written(slot) ? tensors[slot] : nullptr;
        dim.stride[slot] = tensor == nullptr ? 0 : tensor->strides[d] * element_size(*tensor);
      }
    }
    if (param.is_complex) {
      Dimension& dim = entry.row.emplace_back();
      dim.size = 2;
      std::fill_n(dim.stride, kTensors, item_size(param.dtype));
      entry.row_numel *= 2;
    }
    entry.contiguous_row = detail::is_contiguous(entry.row, entry);
    if (param.numel > 0) {
      detail::check_no_overlap(tensors, i);
      aliases.add(memory);
      index_of_row.push_back(i);
    }
    entry.contiguous_values = value.numel == 0 || detail::is_contiguous(value);
    entry.segment = segment;
    entry.index = i;
  }
  detail::check_indices_apart(written_to, read_indices);
  aliases.finish([&](size_t row) { return index_of_row[row]; });
  result.disjoint = aliases.disjoint();
  return result;
}

// Owns the lists that the dispatcher handed over to sparse_adadelta_ or first_invalid_indices.
class SparseLists {
 public:
  SparseLists(ArgumentReader& reader, int32_t device_type)
      : params_(reader.tensors()),
        indices_(reader.tensors()),
        values_(reader.tensors()),
        states_{reader.tensors(), reader.tensors()},
        remainders_(reader.tensors()),
        device_type_(device_type) {}
  SparseLists(const SparseLists&) = delete;
  SparseLists& operator=(const SparseLists&) = delete;

  size_t size() const { return params_.size(); }

  SparseEntries read(const std::vector<int64_t>& sizes, const StateFormat* formats) const {
    return read_sparse_entries(
        {params_, values_, states_, {nullptr, &remainders_}}, indices_, sizes, formats, device_type_
    );
  }

  // The same, where there are no segments.
  SparseEntries read() const { return read({static_cast<int64_t>(size())}, nullptr); }

  DeviceId device(const CallInfo& info) const { return {device_type_, info.device_index}; }

  // One uninitialised int64 for each parameter.
  torch::stable::Tensor new_result(const CallInfo& info) const {
    return new_vector(static_cast<int64_t>(size()), aoti_torch_dtype_int64(), device(info));
  }

 private:
  TensorList params_, indices_, values_;
  TensorList states_[kStates];
  TensorList remainders_;
  int32_t device_type_;
};

// Owns what the dispatcher handed over to sparse_adadelta_.
class SparseArguments {
 public:
  SparseArguments(ArgumentReader reader, int32_t device_type)
      : lists_(reader, device_type),
        given_(reader),
        entries_(lists_.read(given_.sizes(), given_.state_formats().data())),
        options_(given_.read(device(), entries_, lists_.size())) {
    for (const SparseEntry& entry : entries_.entries) {
      if (!entry.contiguous_values) {
        refuse(entry.index, "the values of its gradient are not contiguous");
      }
    }
    for (const Segment& segment : options_.segments) {
      const Scalar weight_decay = segment[kWeightDecay];
      if (weight_decay.is_tensor || weight_decay.number != 0) {
        refuse_call("weight_decay is for whole parameters, not for the rows of sparse gradients");
      }
    }
  }

  const SparseEntries& entries() const { return entries_; }
  const UpdateOptions& options() const { return options_; }
  bool check_only() const { return given_.check_only(); }
  DeviceId device() const { return lists_.device(entries_); }

 private:
  SparseLists lists_;
  OptionArguments given_;
  SparseEntries entries_;
  UpdateOptions options_;
};

}  // namespace torch_adadelta
