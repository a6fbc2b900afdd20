// What an op receives: lists of tensors in which entry i belongs to parameter i. This header reads them through the
// stable ABI, checks them, and turns each parameter into an Entry that a kernel can run without looking back.
#pragma once

#include "dtypes.h"
#include "fail.h"
#include "gil.h"
#include "overlaps.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the name it has had since PyTorch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace torch_adadelta {

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
      fail("a list of tensors could not be read");
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

  TensorInfo info(size_t index, const char* list_name, bool written) const {
    const AtenTensorHandle handle = handles_[index];
    TensorInfo info{};
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    if (layout != aoti_torch_layout_strided()) {
      fail(list_name, "[", index, "] is not a dense tensor");
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
    set_dtype(info, list_name, index);
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
      fail(list_name, "[", index, "] has no memory: its storage was resized");
    }
    return info;
  }

  // Whether the tensor still has the memory, shape, dtype and type of device that `info`, with `written`, found. False,
  // too, for a lazy clone that is looked at in a parallel region, where PyTorch refuses to copy it.
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

  // Throws if the tensor reaches beyond its storage, which somebody may have resized.
  void check_storage(size_t index, const char* list_name, const TensorInfo& info) const {
    int64_t offset = 0, bytes = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handles_[index], &offset));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handles_[index], &bytes));
    if (info.numel > 0 && offset * element_size(info) + info.bytes > bytes) {
      fail(list_name, "[", index, "] reaches beyond its memory: its storage was resized");
    }
  }

 private:
  static void set_dtype(TensorInfo& info, const char* list_name, size_t index) {
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
                         float16 = aoti_torch_dtype_float16(), bfloat16 = aoti_torch_dtype_bfloat16(),
                         complex32 = aoti_torch_dtype_complex32(), complex64 = aoti_torch_dtype_complex64(),
                         complex128 = aoti_torch_dtype_complex128();
    const int32_t type = info.scalar_type;
    if (type == float32 || type == complex64) {
      info.dtype = Dtype::kFloat32;
    } else if (type == float64 || type == complex128) {
      info.dtype = Dtype::kFloat64;
    } else if (type == float16 || type == complex32) {
      info.dtype = Dtype::kFloat16;
    } else if (type == bfloat16) {
      info.dtype = Dtype::kBFloat16;
    } else {
      fail(list_name, "[", index, "] has a dtype that the kernels do not know (ScalarType ", type, ")");
    }
    info.is_complex = type == complex32 || type == complex64 || type == complex128;
  }

  std::vector<AtenTensorHandle> handles_;
};

// Throws unless all lists have as many tensors as the first.
inline void check_lengths(std::initializer_list<std::pair<size_t, const char*>> lists) {
  const size_t count = lists.begin()->first;
  if (std::all_of(lists.begin(), lists.end(), [&](const auto& list) { return list.first == count; })) {
    return;
  }
  std::ostringstream lengths;
  for (const auto& [list, name] : lists) {
    lengths << (name == lists.begin()->second ? ": " : ", ") << list << ' ' << name;
  }
  fail("the lists differ in length", lengths.str());
}

// What the parameters of a call have in common.
struct InCommon {
  int64_t complex_param = -1;  // the index of the first complex parameter, if there is one
  int32_t device_index = 0;    // of all tensors

  // Throws unless the parameter is on the device of the first.
  void add(const TensorInfo& param, size_t index) {
    if (index == 0) {
      device_index = param.device_index;
    } else if (param.device_index != device_index) {
      fail("parameter 0 is on device ", device_index, ", but parameter ", index, " on device ", param.device_index);
    }
    if (param.is_complex && complex_param < 0) {
      complex_param = static_cast<int64_t>(index);
    }
  }
};

// One dimension of a parameter with the strides, in bytes, of its four tensors.
struct Dimension {
  int64_t size;
  int64_t param;
  int64_t grad;
  int64_t square_avg;
  int64_t acc_delta;
};

// The dimensions of a parameter, its innermost dimension in memory last.
using Layout = std::vector<Dimension>;

// One parameter, ready to be updated. If it is dense, all four tensors hold element i at index i of their memory;
// otherwise `layout` leads from an index to each address.
struct Entry {
  char* param;
  char* grad;
  char* square_avg;
  char* acc_delta;
  int64_t numel;         // of real numbers
  int64_t end;           // where its elements end in the concatenation of all entries
  const Layout* layout;  // nullptr if dense
  Dtype dtype;           // of param, square_avg and acc_delta
  Dtype grad_dtype;
  size_t index;             // of the parameter in the lists
  bool grad_aliases_param;  // the gradient is the parameter itself: read a block of it before the block is written
};

struct Entries : InCommon {
  std::vector<Entry> entries;  // empty tensors are left out
  std::deque<Layout> layouts;
  bool disjoint = true;  // false: some memory belongs to two entries, which must then run in their order

  CallMemory memory;  // of each entry

  int64_t numel() const { return entries.empty() ? 0 : entries.back().end; }

  void clear() {
    entries.clear();
    layouts.clear();
    memory.begin();
    complex_param = -1;
  }
};

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

inline bool share_memory(const TensorInfo& x, const TensorInfo& y) {
  return x.data < y.data + y.bytes && y.data < x.data + x.bytes;
}

inline Layout dimensions(
    const TensorInfo& param, const TensorInfo& grad, const TensorInfo& square_avg, const TensorInfo& acc_delta
) {
  Layout dims;
  for (const int64_t d : memory_order(param)) {
    dims.push_back(
        {param.sizes[d],
         param.strides[d] * element_size(param),
         grad.strides[d] * element_size(grad),
         square_avg.strides[d] * element_size(square_avg),
         acc_delta.strides[d] * element_size(acc_delta)}
    );
  }
  if (param.is_complex) {
    dims.push_back(
        {2, item_size(param.dtype), item_size(grad.dtype), item_size(square_avg.dtype), item_size(acc_delta.dtype)}
    );
  }
  return dims;
}

// Each of these throws unless `tensor`, which belongs to parameter `index`, …

// … is on the device of `param`.
inline void check_device(const TensorInfo& param, const TensorInfo& tensor, int32_t device_type, size_t index) {
  if (tensor.device_type != device_type || tensor.device_index != param.device_index) {
    fail("the tensors of parameter ", index, " are not on one device");
  }
}

// … is complex if `param` is.
inline void check_complex(const TensorInfo& param, const TensorInfo& tensor, size_t index) {
  if (tensor.is_complex != param.is_complex) {
    fail("of the tensors of parameter ", index, ", some are complex and some are real");
  }
}

// … is both, and of the shape of `param`.
inline void check_fits(const TensorInfo& param, const TensorInfo& tensor, int32_t device_type, size_t index) {
  check_device(param, tensor, device_type, index);
  if (!same_sizes(param, tensor)) {
    fail("the tensors of parameter ", index, " differ in shape");
  }
  check_complex(param, tensor, index);
}

// The parameter and its state, which are written to. The following throw unless they …
using Written = std::array<const TensorInfo*, 3>;

// … are of one dtype.
inline void check_state_dtype(const Written& tensors, size_t index) {
  if (tensors[1]->dtype != tensors[0]->dtype || tensors[2]->dtype != tensors[0]->dtype) {
    fail("the state of parameter ", index, " has another dtype than the parameter");
  }
}

// … have each element at a place of its own.
inline void check_no_overlap(const Written& tensors, size_t index) {
  for (const TensorInfo* tensor : tensors) {
    if (overlaps_itself(*tensor)) {
      fail("a tensor of parameter ", index, " that would be written to overlaps itself in memory");
    }
  }
}

// … share no memory.
inline void check_apart(const TensorInfo& x, const TensorInfo& y, size_t index) {
  if (share_memory(x, y)) {
    fail("two tensors of parameter ", index, " share memory");
  }
}

inline void check_apart(const Written& tensors, size_t index) {
  check_apart(*tensors[0], *tensors[1], index);
  check_apart(*tensors[0], *tensors[2], index);
  check_apart(*tensors[1], *tensors[2], index);
}

}  // namespace detail

// One for all kinds of lists of state that read_entries is made for.
inline Entries& entries_of_thread() {
  static thread_local Entries entries;
  return entries;
}

// Checks that each parameter's four tensors can be updated together on `device_type`, and describes them. Throws
// std::runtime_error before anything is written.
//
// The result lives as long as the calling thread and until its next call: to allocate and free so much at every step
// costs a tenth of the step for a thousand small tensors.
template <typename StateList>
const Entries& read_entries(
    const TensorList& params,
    const TensorList& grads,
    const StateList& square_avgs,
    const StateList& acc_deltas,
    int32_t device_type
) {
  const size_t count = params.size();
  check_lengths({
      {count, "params"},
      {grads.size(), "grads"},
      {square_avgs.size(), "square_avgs"},
      {acc_deltas.size(), "acc_deltas"},
  });
  Entries& result = entries_of_thread();
  result.clear();

  for (size_t i = 0; i < count; ++i) {
    const TensorInfo param = params.info(i, "params", true);
    const TensorInfo grad = grads.info(i, "grads", false);
    const TensorInfo& square_avg = square_avgs.info(i, "square_avgs", true);
    const TensorInfo& acc_delta = acc_deltas.info(i, "acc_deltas", true);

    for (const TensorInfo* tensor : {&param, &grad, &square_avg, &acc_delta}) {
      detail::check_fits(param, *tensor, device_type, i);
    }
    result.add(param, i);
    const detail::Written written{&param, &square_avg, &acc_delta};
    detail::check_state_dtype(written, i);
    if (param.numel == 0) {
      continue;
    }

    const bool same_layout = detail::same_strides(param, grad) && detail::same_strides(param, square_avg) &&
                             detail::same_strides(param, acc_delta);
    const bool dense =
        same_layout && (detail::is_contiguous(param) ||
                        (param.bytes == param.numel * element_size(param) && !detail::overlaps_itself(param)));
    if (!dense) {
      detail::check_no_overlap(written, i);
    }
    detail::check_apart(written, i);
    detail::check_apart(grad, square_avg, i);
    detail::check_apart(grad, acc_delta, i);
    const bool grad_aliases_param = detail::share_memory(grad, param);
    if (grad_aliases_param &&
        (grad.data != param.data || grad.dtype != param.dtype || !detail::same_strides(param, grad))) {
      fail("the gradient of parameter ", i, " shares memory with the parameter at another place");
    }

    const Layout* layout = nullptr;
    if (!dense) {
      layout = &result.layouts.emplace_back(detail::dimensions(param, grad, square_avg, acc_delta));
    }
    const int64_t numel = param.numel * (param.is_complex ? 2 : 1);
    result.entries.push_back(
        {param.data,
         grad.data,
         square_avg.data,
         acc_delta.data,
         numel,
         result.numel() + numel,
         layout,
         param.dtype,
         grad.dtype,
         i,
         grad_aliases_param}
    );
    result.memory.add({{memory_of(param), memory_of(square_avg), memory_of(acc_delta)}, memory_of(grad)});
  }

  if (result.memory.writes_elsewhere()) {
    for (size_t i = 0; i < count; ++i) {
      params.check_storage(i, "params", params.info(i, "params", false));
      square_avgs.check_storage(i, "square_avgs", square_avgs.info(i, "square_avgs", false));
      acc_deltas.check_storage(i, "acc_deltas", acc_deltas.info(i, "acc_deltas", false));
    }
  }
  result.memory.finish([&](size_t row) { return result.entries[row].index; });
  result.disjoint = result.memory.disjoint();
  return result;
}

// ---- Gradients by themselves ----------------------------------------------------------------------------------------

// One gradient, ready to be read in the order in which its parameter's memory has the elements.
struct Gradient {
  const char* data;
  int64_t numel;         // of real or complex numbers
  int64_t end;           // where its elements end in the concatenation of all gradients
  const Layout* layout;  // nullptr if its own memory has that order, without gaps
  size_t index;          // in the lists
  Dtype dtype;
  bool is_complex;
  bool in_double;  // the arithmetic type
};

struct Gradients : InCommon {
  std::vector<Gradient> gradients;  // empty tensors are left out
  std::deque<Layout> layouts;

  int64_t numel() const { return gradients.empty() ? 0 : gradients.back().end; }
};

namespace detail {

// Whether the memory of a gradient has the order of `layout`, without gaps.
inline bool is_packed(const Layout& layout, const TensorInfo& grad) {
  int64_t expected = item_size(grad.dtype);
  for (auto dim = layout.rbegin(); dim != layout.rend(); ++dim) {
    if (dim->grad != expected) {
      return false;
    }
    expected *= dim->size;
  }
  return true;
}

}  // namespace detail

// Checks that each gradient is one of its parameter, and describes it. The arithmetic type is that of the parameter, or
// double for all. The result lives as that of read_entries does.
inline const Gradients& read_gradients(
    const TensorList& params, const TensorList& grads, bool in_double, int32_t device_type
) {
  check_lengths({{params.size(), "params"}, {grads.size(), "grads"}});
  static thread_local Gradients result;
  result.gradients.clear();
  result.layouts.clear();
  result.complex_param = -1;

  for (size_t i = 0; i < params.size(); ++i) {
    const TensorInfo param = params.info(i, "params", false);
    const TensorInfo grad = grads.info(i, "grads", false);
    detail::check_fits(param, param, device_type, i);
    detail::check_fits(param, grad, device_type, i);
    result.add(param, i);
    if (grad.numel == 0) {
      continue;
    }
    const Layout* layout = nullptr;
    if (!detail::is_contiguous(param) || !detail::is_contiguous(grad)) {
      const Layout& dims = result.layouts.emplace_back(detail::dimensions(param, grad, param, param));
      layout = detail::is_packed(dims, grad) ? nullptr : &dims;
    }
    result.gradients.push_back(
        {grad.data,
         grad.numel,
         result.numel() + grad.numel,
         layout,
         i,
         grad.dtype,
         grad.is_complex,
         in_double || param.dtype == Dtype::kFloat64}
    );
  }
  return result;
}

// Throws if `clipvalue`, infinite where there is none, cannot be applied. `complex_param` is the index of some complex
// parameter, or negative.
inline void check_clipvalue(double clipvalue, int64_t complex_param) {
  if (!(clipvalue >= 0)) {
    fail("clipvalue must be a number >= 0, got ", clipvalue);
  }
  if (clipvalue < std::numeric_limits<double>::infinity() && complex_param >= 0) {
    fail("clipvalue is ", clipvalue, ", but parameter ", complex_param, " is complex, and has no order to clamp in");
  }
}

}  // namespace torch_adadelta
