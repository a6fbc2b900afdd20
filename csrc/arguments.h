// The arguments of adadelta_ on any device, read from the dispatcher's stack and checked.
#pragma once

#include "tensor_lists.h"
#include "update_options.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>

namespace torch_adadelta {

using OptionalTensor = std::optional<torch::stable::Tensor>;

namespace detail {

// An argument that a caller with an older schema, or another overload, does not have.
inline OptionalTensor optional_tensor(const StableIValue* stack, uint64_t count, uint64_t index) {
  return index < count ? torch::stable::detail::to<OptionalTensor>(stack[index]) : std::nullopt;
}

inline std::optional<double> optional_double(const StableIValue* stack, uint64_t count, uint64_t index) {
  return index < count ? torch::stable::detail::to<std::optional<double>>(stack[index]) : std::nullopt;
}

// Where the parameters are.
struct Place {
  int32_t device_type;
  int32_t device_index;

  const char* name() const { return device_type == aoti_torch_device_type_cpu() ? "CPU" : "CUDA"; }

  bool holds(const torch::stable::Tensor& tensor) const {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type == device_type && (type == aoti_torch_device_type_cpu() || tensor.get_device_index() == device_index);
  }
};

inline void check_one_element(const torch::stable::Tensor& tensor, const char* name, const Place& place) {
  if (tensor.numel() != 1 || !place.holds(tensor)) {
    fail(name, " must be a ", place.name(), " tensor of one element, on the device of the parameters");
  }
}

inline const float* float_data(const OptionalTensor& tensor, const char* name, const Place& place) {
  if (!tensor.has_value()) {
    return nullptr;
  }
  check_one_element(*tensor, name, place);
  if (tensor->scalar_type() != torch::headeronly::ScalarType::Float) {
    fail(name, " must have the dtype float32");
  }
  return static_cast<const float*>(tensor->const_data_ptr());
}

}  // namespace detail

// Owns what the dispatcher handed over to adadelta_.
class UpdateArguments {
 public:
  // `stack` as in the schema of adadelta_, whose last arguments may be missing.
  UpdateArguments(StableIValue* stack, uint64_t count, int32_t device_type)
      : params_(stack[0]),
        grads_(stack[1]),
        square_avgs_(stack[2]),
        acc_deltas_(stack[3]),
        clipvalue_(detail::optional_double(stack, count, 11)),
        clipnorm_(detail::optional_double(stack, count, 12)),
        lr_(detail::optional_tensor(stack, count, 8)),
        rho_(detail::optional_tensor(stack, count, 9)),
        epsilon_(detail::optional_tensor(stack, count, 10)),
        square_sums_(detail::optional_tensor(stack, count, 13)),
        factor_(detail::optional_tensor(stack, count, 15)),
        grad_scale_(detail::optional_tensor(stack, count, 16)),
        found_inf_(detail::optional_tensor(stack, count, 17)),
        entries_(read_entries(params_, grads_, square_avgs_, acc_deltas_, device_type)),
        place_{device_type, entries_.device_index} {
    using torch::stable::detail::to;
    options_.lr = scalar(to<double>(stack[4]), lr_, "lr_tensor");
    options_.rho = scalar(to<double>(stack[5]), rho_, "rho_tensor");
    options_.epsilon = scalar(to<double>(stack[6]), epsilon_, "epsilon_tensor");
    options_.maximize = to<bool>(stack[7]);
    options_.clipvalue = clipvalue_.value_or(std::numeric_limits<double>::infinity());
    options_.clipnorm = clipnorm_.value_or(0);
    options_.factor = scalar(count > 14 ? to<double>(stack[14]) : 1, factor_, "factor_tensor");
    options_.grad_scale = detail::float_data(grad_scale_, "grad_scale", place_);
    options_.found_inf = detail::float_data(found_inf_, "found_inf", place_);
    check_clip();
    options_.square_sums =
        square_sums_.has_value() ? static_cast<const double*>(square_sums_->const_data_ptr()) : nullptr;
  }
  UpdateArguments(const UpdateArguments&) = delete;
  UpdateArguments& operator=(const UpdateArguments&) = delete;

  const Entries& entries() const { return entries_; }
  const UpdateOptions& options() const { return options_; }

 private:
  Scalar scalar(double number, const OptionalTensor& tensor, const char* name) const {
    if (!tensor.has_value()) {
      return {number};
    }
    detail::check_one_element(*tensor, name, place_);
    const void* data = tensor->const_data_ptr();
    switch (tensor->scalar_type()) {
      case torch::headeronly::ScalarType::Double:
        return {0, data, Dtype::kFloat64};
      case torch::headeronly::ScalarType::Float:
        return {0, data, Dtype::kFloat32};
      case torch::headeronly::ScalarType::Half:
        return {0, data, Dtype::kFloat16};
      case torch::headeronly::ScalarType::BFloat16:
        return {0, data, Dtype::kBFloat16};
      default:
        fail(name, " must have a floating-point dtype");
    }
  }

  // Throws unless the clip options fit together and with the parameters.
  void check_clip() const {
    check_clipvalue(options_.clipvalue, entries_.complex_param);
    if (clipnorm_.has_value() != square_sums_.has_value()) {
      fail("clipnorm and square_sums must be given together");
    }
    if (!clipnorm_.has_value()) {
      return;
    }
    if (!(*clipnorm_ >= 0)) {
      fail("clipnorm must be a number >= 0, got ", *clipnorm_);
    }
    if (factor_.has_value() || options_.factor.number != 1) {
      fail("clipnorm is ", *clipnorm_, ", but a factor is given, too");
    }
    const auto& sums = *square_sums_;
    if (!place_.holds(sums) || sums.scalar_type() != torch::headeronly::ScalarType::Double || sums.dim() != 1 ||
        sums.numel() != static_cast<int64_t>(params_.size()) || !sums.is_contiguous()) {
      fail(
          "square_sums must be a contiguous float64 ",
          place_.name(),
          " tensor with one element for each of ",
          params_.size(),
          " parameters"
      );
    }
  }

  TensorList params_, grads_, square_avgs_, acc_deltas_;
  std::optional<double> clipvalue_, clipnorm_;
  OptionalTensor lr_, rho_, epsilon_, square_sums_, factor_, grad_scale_, found_inf_;
  const Entries& entries_;
  detail::Place place_;
  UpdateOptions options_;
};

// Owns what the dispatcher handed over to grad_square_sums.
class SquareSumArguments {
 public:
  SquareSumArguments(StableIValue* stack, uint64_t count, int32_t device_type)
      : params_(stack[0]),
        grads_(stack[1]),
        clipvalue_(detail::optional_double(stack, count, 2).value_or(std::numeric_limits<double>::infinity())),
        grad_scale_(detail::optional_tensor(stack, count, 4)),
        gradients_(read_gradients(params_, grads_, torch::stable::detail::to<bool>(stack[3]), device_type)),
        place_{device_type, gradients_.device_index},
        grad_scale_data_(detail::float_data(grad_scale_, "grad_scale", place_)) {
    check_clipvalue(clipvalue_, gradients_.complex_param);
  }
  SquareSumArguments(const SquareSumArguments&) = delete;
  SquareSumArguments& operator=(const SquareSumArguments&) = delete;

  const Gradients& gradients() const { return gradients_; }
  double clipvalue() const { return clipvalue_; }
  const float* grad_scale() const { return grad_scale_data_; }
  size_t param_count() const { return params_.size(); }

  // Uninitialised numbers beside the parameters.
  torch::stable::Tensor new_doubles(int64_t count) const {
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &count, &stride, aoti_torch_dtype_float64(), place_.device_type, place_.device_index, &handle
    ));
    return torch::stable::Tensor(handle);
  }

  torch::stable::Tensor new_result() const { return new_doubles(static_cast<int64_t>(params_.size())); }

 private:
  TensorList params_, grads_;
  double clipvalue_;
  OptionalTensor grad_scale_;
  const Gradients& gradients_;
  detail::Place place_;
  const float* grad_scale_data_;
};

}  // namespace torch_adadelta
