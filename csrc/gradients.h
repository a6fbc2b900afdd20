// Gradients by themselves, of which an op sums the squares: read, checked and described.
#pragma once

#include "tensor_lists.h"

#include <cstdint>
#include <deque>
#include <vector>

namespace torch_adadelta {

// One gradient, ready to be read in the order in which its parameter's memory has the elements.
struct Gradient {
  const char* data;
  int64_t numel;         // of real or complex numbers
  int64_t end;           // where its elements end in the concatenation of all gradients
  const Layout* layout;  // nullptr if its own memory has that order, without gaps
  size_t index;          // in the lists
  Dtype dtype;
  bool is_complex;
  bool in_double;  // the opmath dtype
};

// What read_gradients finds; its owner keeps it, as a Workspace.
struct Gradients : CallInfo {
  std::vector<Gradient> gradients;  // empty tensors are left out
  std::deque<Layout> layouts;

  int64_t numel() const { return gradients.empty() ? 0 : gradients.back().end; }
};

namespace detail {

// Whether the memory of a gradient has the order of `layout`, without gaps.
inline bool is_packed(const Layout& layout, const TensorInfo& grad) {
  int64_t expected = item_size(grad.dtype);
  for (auto dim = layout.rbegin(); dim != layout.rend(); ++dim) {
    if (dim->stride[kGrad] != expected) {
      return false;
    }
    expected *= dim->size;
  }
  return true;
}

}  // namespace detail

// Checks that each gradient is one of its parameter, and describes it. The opmath dtype is that of the parameter, or
// double for all.
inline void read_gradients(
    Gradients& result, const TensorList& params, const TensorList& grads, bool in_double, int32_t device_type
) {
  check_lengths({{params.size(), kListNames[kParam]}, {grads.size(), kListNames[kGrad]}});
  result.gradients.clear();
  result.layouts.clear();
  result.complex_param = -1;

  for (size_t i = 0; i < params.size(); ++i) {
    const TensorInfo param = params.info(i, kOwnNames[kParam], false);
    const TensorInfo grad = grads.info(i, kOwnNames[kGrad], false);
    detail::check_fits(param, param, device_type, i);
    detail::check_fits(param, grad, device_type, i);
    result.add(param, i);
    if (grad.numel == 0) {
      continue;
    }
    const Layout* layout = nullptr;
    if (!detail::is_contiguous(param) || !detail::is_contiguous(grad)) {
      TensorRow tensors;
      tensors.fill(&param);
      tensors[kGrad] = &grad;
      const Layout& dims = result.layouts.emplace_back(detail::dimensions(tensors));
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
}

}  // namespace torch_adadelta
