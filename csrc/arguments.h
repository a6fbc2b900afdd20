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

inline const void* data_of(const torch::stable::Tensor& tensor, const char* name) {
  const void* data = tensor.const_data_ptr();
  if (is_null(data) && tensor.numel() > 0) {
    fail(name, " has no memory: its storage was resized");
  }
  return data;
}

inline const float* float_data(const OptionalTensor& tensor, const char* name, const Place& place) {
  if (!tensor.has_value()) {
    return nullptr;
  }
  check_one_element(*tensor, name, place);
  if (tensor->scalar_type() != torch::headeronly::ScalarType::Float) {
    fail(name, " must have the dtype float32");
  }
  return static_cast<const float*>(data_of(*tensor, name));
}

}  // namespace detail

// Uninitialised numbers.
inline torch::stable::Tensor new_vector(int64_t count, int32_t dtype, const detail::Place& place) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &count, &stride, dtype, place.device_type, place.device_index, &handle)
  );
  return torch::stable::Tensor(handle);
}

// The hyperparameters and options of an update, which the schemas of adadelta_ and sparse_adadelta_ have in common.
class OptionArguments {
 public:
  // They begin at stack[first], and the last of them may be missing.
  OptionArguments(StableIValue* stack, uint64_t count, uint64_t first)
      : lr_number_(torch::stable::detail::to<double>(stack[first])),
        rho_number_(torch::stable::detail::to<double>(stack[first + 1])),
        epsilon_number_(torch::stable::detail::to<double>(stack[first + 2])),
        maximize_(torch::stable::detail::to<bool>(stack[first + 3])),
        lr_(detail::optional_tensor(stack, count, first + 4)),
        rho_(detail::optional_tensor(stack, count, first + 5)),
        epsilon_(detail::optional_tensor(stack, count, first + 6)),
        clipvalue_(detail::optional_double(stack, count, first + 7)),
        clipnorm_(detail::optional_double(stack, count, first + 8)),
        square_sums_(detail::optional_tensor(stack, count, first + 9)),
        factor_number_(first + 10 < count ? torch::stable::detail::to<double>(stack[first + 10]) : 1),
        factor_(detail::optional_tensor(stack, count, first + 11)),
        grad_scale_(detail::optional_tensor(stack, count, first + 12)),
        found_inf_(detail::optional_tensor(stack, count, first + 13)) {}
  OptionArguments(const OptionArguments&) = delete;
  OptionArguments& operator=(const OptionArguments&) = delete;

  // What they say to an update of `param_count` parameters, of which `complex_param` is some complex one, or negative.
  // Throws unless they fit together and with the parameters.
  UpdateOptions read(const detail::Place& place, size_t param_count, int64_t complex_param) const {
    UpdateOptions options;
    options.lr = scalar(lr_number_, lr_, "lr_tensor", place);
    options.rho = scalar(rho_number_, rho_, "rho_tensor", place);
    options.epsilon = scalar(epsilon_number_, epsilon_, "epsilon_tensor", place);
    options.maximize = maximize_;
    options.clipvalue = clipvalue_.value_or(std::numeric_limits<double>::infinity());
    options.clipnorm = clipnorm_.value_or(0);
    options.factor = scalar(factor_number_, factor_, "factor_tensor", place);
    options.grad_scale = detail::float_data(grad_scale_, "grad_scale", place);
    options.found_inf = detail::float_data(found_inf_, "found_inf", place);
    check_clipvalue(options.clipvalue, complex_param);
    check_clipnorm(options, place, param_count);
    options.square_sums =
        square_sums_.has_value() ? static_cast<const double*>(detail::data_of(*square_sums_, "square_sums")) : nullptr;
    return options;
  }

 private:
  static Scalar scalar(double number, const OptionalTensor& tensor, const char* name, const detail::Place& place) {
    if (!tensor.has_value()) {
      return {number};
    }
    detail::check_one_element(*tensor, name, place);
    const void* data = detail::data_of(*tensor, name);
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

  void check_clipnorm(const UpdateOptions& options, const detail::Place& place, size_t param_count) const {
    if (clipnorm_.has_value() != square_sums_.has_value()) {
      fail("clipnorm and square_sums must be given together");
    }
    if (!clipnorm_.has_value()) {
      return;
    }
    if (!(*clipnorm_ >= 0)) {
      fail("clipnorm must be a number >= 0, got ", *clipnorm_);
    }
    if (factor_.has_value() || options.factor.number != 1) {
      fail("clipnorm is ", *clipnorm_, ", but a factor is given, too");
    }
    const auto& sums = *square_sums_;
    if (!place.holds(sums) || sums.scalar_type() != torch::headeronly::ScalarType::Double || sums.dim() != 1 ||
        sums.numel() != static_cast<int64_t>(param_count) || !sums.is_contiguous()) {
      fail(
          "square_sums must be a contiguous float64 ",
          place.name(),
          " tensor with one element for each of ",
          param_count,
          " parameters"
      );
    }
  }

  double lr_number_, rho_number_, epsilon_number_;
  bool maximize_;
  OptionalTensor lr_, rho_, epsilon_;
  std::optional<double> clipvalue_, clipnorm_;
  OptionalTensor square_sums_;
  double factor_number_;
  OptionalTensor factor_, grad_scale_, found_inf_;
};

// Owns what the dispatcher handed over to adadelta_.
class UpdateArguments {
 public:
  // `stack` as in the schema of adadelta_, whose last arguments may be missing.
  UpdateArguments(StableIValue* stack, uint64_t count, int32_t device_type)
      : params_(stack[0]),
        grads_(stack[1]),
        square_avgs_(stack[2]),
        acc_deltas_(stack[3]),
        given_(stack, count, 4),
        entries_(read_entries(params_, grads_, square_avgs_, acc_deltas_, device_type)),
        options_(given_.read({device_type, entries_.device_index}, params_.size(), entries_.complex_param)) {}
  UpdateArguments(const UpdateArguments&) = delete;
  UpdateArguments& operator=(const UpdateArguments&) = delete;
  ~UpdateArguments() { gil_.emplace(); }

  const Entries& entries() const { return entries_; }
  const UpdateOptions& options() const { return options_; }

 private:
  std::optional<HeldGil> gil_;  // before what is destroyed while it is held
  TensorList params_, grads_, square_avgs_, acc_deltas_;
  OptionArguments given_;
  const Entries& entries_;
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
  ~SquareSumArguments() { gil_.emplace(); }

  const Gradients& gradients() const { return gradients_; }
  double clipvalue() const { return clipvalue_; }
  const float* grad_scale() const { return grad_scale_data_; }
  size_t param_count() const { return params_.size(); }

  // Uninitialised numbers beside the parameters.
  torch::stable::Tensor new_doubles(int64_t count) const {
    return new_vector(count, aoti_torch_dtype_float64(), place_);
  }

  torch::stable::Tensor new_result() const { return new_doubles(static_cast<int64_t>(params_.size())); }

 private:
  std::optional<HeldGil> gil_;  // before what is destroyed while it is held
  TensorList params_, grads_;
  double clipvalue_;
  OptionalTensor grad_scale_;
  const Gradients& gradients_;
  detail::Place place_;
  const float* grad_scale_data_;
};

}  // namespace torch_adadelta
