// What an op receives: lists of tensors in which entry i belongs to parameter i. This header reads them through the
// stable ABI, checks them, and turns each parameter into an Entry that a kernel can run without looking back.
#pragma once

#include "aliasing.h"
#include "dtypes.h"
#include "gil.h"
#include "refusal.h"
#include "segments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <sstream>
#include <utility>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the name it has had since PyTorch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace torch_adadelta {

constexpr const char* kListNames[kTensors] = {"params", "grads", "square_avgs", "acc_deltas", "averages", "remainders"};

// What PyTorch knows of one tensor. Pointers into its sizes and strides stay valid as long as the tensor lives.
struct TensorInfo {
  char* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
  int64_t numel;
  int64_t bytes;  // from the first element in memory to the end of the last
  int32_t scalar_type;
  int32_t device_type;
  int32_t device_index;
  Dtype dtype;
  bool is_complex;
};

inline int64_t element_size(const TensorInfo& x) { return item_size(x.dtype) * (x.is_complex ? 2 : 1); }

inline MemoryRange memory_of(const TensorInfo& x) { return {x.data, x.data + (x.numel > 0 ? x.bytes : 0)}; }

// Whether this is where a tensor without memory would have its data: at an offset from nothing. No system gives out the
// first page.
inline bool is_null(const void* data) { return reinterpret_cast<uintptr_t>(data) < 4096; }

// Owns the tensors of a list that the dispatcher handed over; to let go of many, hold the GIL. Bare handles instead of
// torch::stable::Tensor, whose shared_ptr would cost one more allocation a tensor.
class TensorList {
 public:
  explicit TensorList(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    size_t size = 0;
    bool ok = torch_list_size(list, &size) == AOTI_TORCH_SUCCESS;
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      ok = torch_list_get_item(list, i, &item) == AOTI_TORCH_SUCCESS && ok;
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    torch_delete_list(list);
    if (!ok) {
      refuse_call("a list of tensors could not be read");
    }
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (const AtenTensorHandle handle : handles_) {
      aoti_torch_delete_tensor_object(handle);
    }
  }

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t index) const { return handles_[index]; }

  // Asks for what PyTorch keeps of tensors that come soon after `index`. Between two steps other work uses the caches,
  // and this is what a loop over many tensors then waits for: with it an update of 1000 small ones takes an eighth
  // less.
  //
  // A handle is a pointer to an at::Tensor, that is to a pointer to what PyTorch keeps of the tensor, in which the
  // address of its storage stands after 16 bytes. In a PyTorch where something else stands there, that is asked for, in
  // vain.
  ADADELTA_INLINE void prefetch_after(size_t index) const {
    constexpr size_t kHandleAhead = 18, kTensorAhead = 12, kStorageAhead = 6;
    const auto pointer_at = [](const void* address) { return *static_cast<const char* const*>(address); };
    const size_t left = handles_.size() - index;
    if (kHandleAhead < left) {
      __builtin_prefetch(handles_[index + kHandleAhead]);
    }
    if (kTensorAhead < left) {
      const char* tensor = pointer_at(handles_[index + kTensorAhead]);
      for (int line = 0; line < 4; ++line) {
        __builtin_prefetch(tensor + 64 * line);
      }
    }
    if (kStorageAhead < left) {
      const char* storage = pointer_at(pointer_at(handles_[index + kStorageAhead]) + 16);
      __builtin_prefetch(storage);
      __builtin_prefetch(storage + 64);
    }
  }

  // `name` is how messages about its parameter call the tensor. Only a remainder may have the dtype int16.
  TensorInfo info(size_t index, const char* name, bool written, bool is_remainder = false) const {
    const AtenTensorHandle handle = handles_[index];
    TensorInfo info{};
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    if (layout != aoti_torch_layout_strided()) {
      refuse(index, name, " is not a dense tensor");
    }
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &info.dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &info.scalar_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &info.device_type));
    static const int32_t cpu = aoti_torch_device_type_cpu();
    if (info.device_type != cpu) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &info.device_index));
    }
    info.sizes = sizes;
    info.strides = strides;
    set_dtype(info, name, index, is_remainder);
    info.numel = 1;
    int64_t last = 0;
    for (int64_t d = 0; d < info.dim; ++d) {
      info.numel *= sizes[d];
      last += (sizes[d] - 1) * strides[d];
    }
    info.bytes = (last + 1) * element_size(info);
    if (written) {
      void* data = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &data));
      info.data = static_cast<char*>(data);
    } else {
      const void* data = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
      info.data = static_cast<char*>(const_cast<void*>(data));
    }
    if (info.numel > 0 && is_null(info.data)) {
      refuse(index, name, " has no memory: its storage was resized");
    }
    return info;
  }

  // The same of a list that holds one of the tensors of each parameter. `storage` is where the result may lie.
  const TensorInfo& info(size_t index, Slot slot, TensorInfo& storage) const {
    storage = info(index, kOwnNames[slot], is_written(slot), slot == kRemainder);
    return storage;
  }

  // Whether the tensor still has the memory, shape, dtype and type of device that `info`, of a tensor that is written
  // to, found.
  bool is_still(size_t index, const TensorInfo& known) const {
    const AtenTensorHandle handle = handles_[index];
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    int64_t dim = 0;
    int32_t scalar_type = 0, device_type = 0;
    void* data = nullptr;
    return aoti_torch_get_dim(handle, &dim) == AOTI_TORCH_SUCCESS && dim == known.dim &&
           aoti_torch_get_sizes(handle, &sizes) == AOTI_TORCH_SUCCESS && std::equal(sizes, sizes + dim, known.sizes) &&
           aoti_torch_get_strides(handle, &strides) == AOTI_TORCH_SUCCESS &&
           std::equal(strides, strides + dim, known.strides) &&
           aoti_torch_get_dtype(handle, &scalar_type) == AOTI_TORCH_SUCCESS && scalar_type == known.scalar_type &&
           aoti_torch_get_device_type(handle, &device_type) == AOTI_TORCH_SUCCESS && device_type == known.device_type &&
           torch_get_mutable_data_ptr(handle, &data) == AOTI_TORCH_SUCCESS && data == known.data;
  }

  // Refuses a tensor that reaches beyond its storage, which somebody may have resized.
  void check_storage(size_t index, const char* name, const TensorInfo& info) const {
    int64_t offset = 0, bytes = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handles_[index], &offset));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handles_[index], &bytes));
    if (info.numel > 0 && offset * element_size(info) + info.bytes > bytes) {
      refuse(index, name, " reaches beyond its memory: its storage was resized");
    }
  }

 private:
  static void set_dtype(TensorInfo& info, const char* name, size_t index, bool is_remainder) {
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
                         float16 = aoti_torch_dtype_float16(), bfloat16 = aoti_torch_dtype_bfloat16(),
                         complex32 = aoti_torch_dtype_complex32(), complex64 = aoti_torch_dtype_complex64(),
                         complex128 = aoti_torch_dtype_complex128(), int16 = aoti_torch_dtype_int16();
    const int32_t type = info.scalar_type;
    if (type == float32 || type == complex64) {
      info.dtype = Dtype::kFloat32;
    } else if (type == float64 || type == complex128) {
      info.dtype = Dtype::kFloat64;
    } else if (type == float16 || type == complex32) {
      info.dtype = Dtype::kFloat16;
    } else if (type == bfloat16) {
      info.dtype = Dtype::kBFloat16;
    } else if (type == int16 && is_remainder) {
      info.dtype = Dtype::kInt16;
    } else {
      refuse(index, name, " has a dtype that the kernels do not know (ScalarType ", type, ")");
    }
    info.is_complex = type == complex32 || type == complex64 || type == complex128;
  }

  std::vector<AtenTensorHandle> handles_;
};

// Refuses lists, the first `used` of these, of which one has not as many tensors as the first.
template <size_t count>
void check_lengths(const std::pair<size_t, const char*> (&lists)[count], size_t used = count) {
  if (std::all_of(lists, lists + used, [&](const auto& list) { return list.first == lists[0].first; })) {
    return;
  }
  std::ostringstream lengths;
  for (size_t i = 0; i < used; ++i) {
    lengths << (i == 0 ? ": " : ", ") << lists[i].first << ' ' << lists[i].second;
  }
  refuse_call("the lists differ in length", lengths.str());
}

// What the parameters of a call have in common.
struct CallInfo {
  int64_t complex_param = -1;  // the index of the first complex parameter, if there is one
  int32_t device_index = 0;    // of all tensors

  // Refuses a parameter that is not on the device of the first.
  void add(const TensorInfo& param, size_t index) {
    if (index == 0) {
      device_index = param.device_index;
    } else if (param.device_index != device_index) {
      refuse(index, "it is on device ", param.device_index, ", but parameter 0 on device ", device_index);
    }
    if (param.is_complex && complex_param < 0) {
      complex_param = static_cast<int64_t>(index);
    }
  }
};

// One dimension of a parameter with the strides, in bytes, of its tensors.
struct Dimension {
  int64_t size;
  int64_t stride[kTensors];
};

// The dimensions of a parameter, its innermost dimension in memory last.
using Layout = std::vector<Dimension>;

// One parameter, ready to be updated. If it is dense, all its tensors hold element i at index i of their memory;
// otherwise `layout` leads from an index to each address.
struct Entry {
  char* data[kTensors];  // nullptr where there is none
  int64_t numel;         // of real numbers
  int64_t end;           // where its elements end in the concatenation of all entries
  const Layout* layout;  // nullptr if dense
  size_t index;          // of the parameter in the lists
  uint32_t segment;
  Dtype dtype[kTensors];  // one for all state, T for the average
};

// What read_entries finds. Its owner keeps it from call to call: to allocate and free so much at every step costs a
// tenth of the step for a thousand small tensors, and `aliases` remembers what was found.
struct Workspace : CallInfo {
  std::vector<Entry> entries;  // empty tensors are left out
  std::deque<Layout> layouts;
  bool disjoint = true;  // false: a parameter is listed twice, and the entries must run in their order

  AliasChecker aliases;

  int64_t numel() const { return entries.empty() ? 0 : entries.back().end; }

  void clear() {
    entries.clear();
    layouts.clear();
    aliases.begin();
    complex_param = -1;
  }
};

// The tensors of one parameter, nullptr for those that a call does not have.
using TensorRow = std::array<const TensorInfo*, kTensors>;

namespace detail {

inline bool same_sizes(const TensorInfo& x, const TensorInfo& y) {
  return x.dim == y.dim && std::equal(x.sizes, x.sizes + x.dim, y.sizes);
}

// Whether x and y keep each index at the same place. The stride of a dimension of size one means nothing.
inline bool same_strides(const TensorInfo& x, const TensorInfo& y) {
  for (int64_t d = 0; d < x.dim; ++d) {
    if (x.strides[d] != y.strides[d] && x.sizes[d] != 1) {
      return false;
    }
  }
  return true;
}

inline bool is_contiguous(const TensorInfo& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim - 1; d >= 0; --d) {
    if (x.sizes[d] != 1) {
      if (x.strides[d] != expected) {
        return false;
      }
      expected *= x.sizes[d];
    }
  }
  return true;
}

// The dimensions of more than one element, outermost in memory first.
inline std::vector<int64_t> memory_order(const TensorInfo& x) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim; ++d) {
    if (x.sizes[d] != 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return x.strides[i] > x.strides[j]; });
  return order;
}

// Whether two indices of a tensor may share memory, as in an expanded tensor. PyTorch's own test is as strict.
inline bool overlaps_itself(const TensorInfo& x) {
  const auto order = memory_order(x);
  int64_t extent = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (x.strides[*d] < extent) {
      return true;
    }
    extent = x.strides[*d] * (x.sizes[*d] - 1) + extent;
  }
  return false;
}

inline Layout dimensions(const TensorRow& tensors) {
  const TensorInfo& param = *tensors[kParam];
  Layout dims;
  for (const int64_t d : memory_order(param)) {
    Dimension& dim = dims.emplace_back();
    dim.size = param.sizes[d];
    for (int slot = 0; slot < kTensors; ++slot) {
      const TensorInfo* tensor = tensors[slot];
      dim.stride[slot] = tensor == nullptr ? 0 : tensor->strides[d] * element_size(*tensor);
    }
  }
  if (param.is_complex) {
    Dimension& dim = dims.emplace_back();
    dim.size = 2;
    for (int slot = 0; slot < kTensors; ++slot) {
      dim.stride[slot] = tensors[slot] == nullptr ? 0 : item_size(tensors[slot]->dtype);
    }
  }
  return dims;
}

// Each of these refuses parameter `index` unless `tensor`, which belongs to it, …

// … is on its device.
inline void check_device(const TensorInfo& param, const TensorInfo& tensor, int32_t device_type, size_t index) {
  if (tensor.device_type != device_type || tensor.device_index != param.device_index) {
    refuse(index, "its tensors are not on one device");
  }
}

// … is complex if it is.
inline void check_complex(const TensorInfo& param, const TensorInfo& tensor, size_t index) {
  if (tensor.is_complex != param.is_complex) {
    refuse(index, "of its tensors, some are complex and some are real");
  }
}

// … is both, and of its shape.
inline void check_fits(const TensorInfo& param, const TensorInfo& tensor, int32_t device_type, size_t index) {
  check_device(param, tensor, device_type, index);
  if (!same_sizes(param, tensor)) {
    refuse(index, "its tensors differ in shape");
  }
  check_complex(param, tensor, index);
}

// The following look at the tensors that are written to: the parameter and its state. They refuse those that are not …

// … of the dtype that the parameter and its segment ask for. Who knows no segment, nullptr, takes any that one could
// ask for.
inline void check_state_dtype(const TensorRow& tensors, const StateFormat* format, size_t index) {
  const TensorInfo& param = *tensors[kParam];
  const Dtype own = param.dtype, opmath = own == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const char* kind = param.is_complex ? "complex" : own == Dtype::kFloat64 ? "float64" : nullptr;
  Dtype wanted = own;
  if (format == nullptr) {
    const Dtype state = tensors[kFirstState]->dtype;
    wanted = kind == nullptr && (state == Dtype::kFloat32 || state == Dtype::kBFloat16) ? state : own;
  } else if (format->dtype != StateFormat::kOwn) {
    if (kind != nullptr) {
      refuse(index, "it is ", kind, ", and has state of its own dtype: state_dtype must be 0, not ", format->dtype);
    }
    wanted = format->dtype == StateFormat::kFloat32 ? Dtype::kFloat32 : Dtype::kBFloat16;
  }
  for (int slot = kFirstState; slot < kFirstState + kStates; ++slot) {
    if (tensors[slot]->dtype != wanted) {
      const bool is_own = format == nullptr || format->dtype == StateFormat::kOwn;
      refuse(index, "its state has another dtype than ", is_own ? "the parameter" : "its state_dtype");
    }
  }
  if (tensors[kAverage] != nullptr && tensors[kAverage]->dtype != opmath) {
    refuse(index, "its average has another dtype than that in which the parameter is updated");
  }
}

// … with a remainder where a master needs one, and only there. `format` as in check_state_dtype.
inline void check_remainder(const TensorRow& tensors, const StateFormat* format, size_t index) {
  const TensorInfo &param = *tensors[kParam], *remainder = tensors[kRemainder];
  const bool is_bfloat16 = param.dtype == Dtype::kBFloat16;
  const bool has_masters = format == nullptr ? remainder != nullptr : format->has_masters;
  if (has_masters && (param.is_complex || param.dtype == Dtype::kFloat16)) {
    refuse(index, "it is ", param.is_complex ? "complex" : "float16", ", and has no master: has_masters must be 0");
  }
  if (remainder == nullptr ? has_masters && is_bfloat16 : !has_masters || !is_bfloat16) {
    refuse(
        index,
        remainder == nullptr ? "it has a master, but no remainder" : "it has a remainder",
        remainder == nullptr ? ""
        : is_bfloat16        ? ", but has_masters is 0"
                             : ", but is not bfloat16"
    );
  }
  if (remainder != nullptr && remainder->dtype != Dtype::kInt16) {
    refuse(index, "its remainder has another dtype than int16");
  }
}

// … such that each element has a place of its own.
inline void check_no_overlap(const TensorRow& tensors, size_t index) {
  for (int slot = 0; slot < kTensors; ++slot) {
    if (is_written(slot) && tensors[slot] != nullptr && overlaps_itself(*tensors[slot])) {
      refuse(index, kOwnNames[slot], " would be written to, but overlaps itself in memory");
    }
  }
}

}  // namespace detail

// The lists of the tensors of each parameter.
template <typename StateList>
struct Lists {
  const TensorList& params;
  const TensorList& grads;
  const StateList* states;                                // kStates of them
  std::array<const TensorList*, kOptionals> optionals{};  // nullptr or empty: none

  // Calls run(slot, list) for the optional lists that there are.
  template <typename Run>
  void for_each_optional(const Run& run) const {
    for (int k = 0; k < kOptionals; ++k) {
      if (optionals[k] != nullptr && optionals[k]->size() > 0) {
        run(static_cast<Slot>(kFirstOptional + k), *optionals[k]);
      }
    }
  }

  TensorRow row(size_t index, std::array<TensorInfo, kTensors>& storage) const {
    TensorRow tensors{&params.info(index, kParam, storage[kParam]), &grads.info(index, kGrad, storage[kGrad])};
    for (int state = 0; state < kStates; ++state) {
      const int slot = kFirstState + state;
      tensors[slot] = &states[state].info(index, static_cast<Slot>(slot), storage[slot]);
    }
    for_each_optional([&](Slot slot, const TensorList& list) {
      tensors[slot] = &list.info(index, slot, storage[slot]);
    });
    return tensors;
  }

  void check_lengths() const {
    std::pair<size_t, const char*> lengths[kTensors] = {
        {params.size(), kListNames[kParam]}, {grads.size(), kListNames[kGrad]}
    };
    for (int state = 0; state < kStates; ++state) {
      lengths[kFirstState + state] = {states[state].size(), kListNames[kFirstState + state]};
    }
    size_t used = kFirstOptional;
    for_each_optional([&](Slot slot, const TensorList& list) { lengths[used++] = {list.size(), kListNames[slot]}; });
    torch_adadelta::check_lengths(lengths, used);
  }

  // Of what is written to.
  void check_storage(size_t index) const {
    std::array<TensorInfo, kTensors> storage;
    const TensorRow tensors = row(index, storage);
    params.check_storage(index, kOwnNames[kParam], *tensors[kParam]);
    for (int state = 0; state < kStates; ++state) {
      const int slot = kFirstState + state;
      states[state].check_storage(index, kOwnNames[slot], *tensors[slot]);
    }
    for_each_optional([&](Slot slot, const TensorList& list) {
      list.check_storage(index, kOwnNames[slot], *tensors[slot]);
    });
  }
};

// Checks that each parameter's tensors can be updated together on `device_type`, and describes them. `sizes` and
// `formats` are those of the segments.
template <typename StateList>
void read_entries(
    Workspace& workspace,
    const Lists<StateList>& lists,
    const std::vector<int64_t>& sizes,
    const std::vector<StateFormat>& formats,
    int32_t device_type
) {
  lists.check_lengths();
  const size_t count = lists.params.size();
  check_sizes(sizes, count);
  SegmentCursor segments(sizes);
  workspace.clear();

  const bool is_on_host = device_type == aoti_torch_device_type_cpu();
  for (size_t i = 0; i < count; ++i) {
    lists.params.prefetch_after(i);
    lists.grads.prefetch_after(i);
    std::array<TensorInfo, kTensors> storage;
    const TensorRow tensors = lists.row(i, storage);
    const TensorInfo& param = *tensors[kParam];
    for (const TensorInfo* tensor : tensors) {
      if (tensor != nullptr) {
        detail::check_fits(param, *tensor, device_type, i);
      }
    }
    workspace.add(param, i);
    const uint32_t segment = segments.segment_of(i);
    detail::check_state_dtype(tensors, &formats[segment], i);
    detail::check_remainder(tensors, &formats[segment], i);
    if (param.numel == 0) {
      continue;
    }

    bool dense = true;
    for (const TensorInfo* tensor : tensors) {
      dense = dense && (tensor == nullptr || detail::same_strides(param, *tensor));
    }
    dense = dense && (detail::is_contiguous(param) ||
                      (param.bytes == param.numel * element_size(param) && !detail::overlaps_itself(param)));
    if (!dense) {
      detail::check_no_overlap(tensors, i);
    }

    const int64_t numel = param.numel * (param.is_complex ? 2 : 1), end = workspace.numel() + numel;
    Entry& entry = workspace.entries.emplace_back();  // of zeros
    RowMemory memory{};
    for (int slot = 0; slot < kTensors; ++slot) {
      if (tensors[slot] != nullptr) {
        entry.data[slot] = tensors[slot]->data;
        entry.dtype[slot] = tensors[slot]->dtype;
        memory[slot] = memory_of(*tensors[slot]);
      }
    }
    entry.numel = numel;
    entry.end = end;
    entry.layout = dense ? nullptr : &workspace.layouts.emplace_back(detail::dimensions(tensors));
    entry.index = i;
    entry.segment = segment;
    if (is_on_host) {  // as for prefetch_after: a tenth less
      for (int slot = 0; slot < kTensors; ++slot) {
        if (tensors[slot] != nullptr) {
          __builtin_prefetch(entry.data[slot], 1);
        }
      }
    }
    workspace.aliases.add(memory);
  }

  if (workspace.aliases.writes_elsewhere()) {
    for (size_t i = 0; i < count; ++i) {
      lists.check_storage(i);
    }
  }
  workspace.aliases.finish([&](size_t row) { return workspace.entries[row].index; });
  workspace.disjoint = workspace.aliases.disjoint();
}

}  // namespace torch_adadelta
