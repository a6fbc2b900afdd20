// The options of a call, as a kernel takes them, and the arguments of the ops on any device, read from the dispatcher's
// stack and checked.
#pragma once

#include "adadelta.h"
#include "gradients.h"
#include "tensor_lists.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <optional>

namespace torch_adadelta {

// ---- What a kernel takes --------------------------------------------------------------------------------------------

// A number; or, with `is_tensor`, the one element of a tensor, which is read where the kernel runs.
struct Scalar {
  union {
    double number = 0;
    const void* data;
  };
  Dtype dtype = Dtype::kFloat64;  // of the element
  bool is_tensor = false;
};

// The hyperparameters of consecutive parameters, packed: a launch on the GPU has room for so many bytes.
class Segment {
 public:
  ADADELTA_INLINE Scalar operator[](int which) const {
    Scalar result;
    result.dtype = dtypes_[which];
    result.is_tensor = is_tensor_[which];
    if (result.is_tensor) {
      result.data = values_[which].data;
    } else {
      result.number = values_[which].number;
    }
    return result;
  }

  void set(size_t which, const Scalar& value) {
    dtypes_[which] = value.dtype;
    is_tensor_[which] = value.is_tensor;
    if (value.is_tensor) {
      values_[which].data = value.data;
    } else {
      values_[which].number = value.number;
    }
  }

  ADADELTA_INLINE bool maximize() const { return values_[kMaximize].number != 0; }

 private:
  union Value {
    double number;
    const void* data;
  };

  Value values_[kHyperparameters];
  Dtype dtypes_[kHyperparameters];
  bool is_tensor_[kHyperparameters];
};

// What becomes of the gradients, and with what. Complete already in itself: a kernel can take it by value.
struct GradientOptions {
  double clipvalue = std::numeric_limits<double>::infinity();
  double clipnorm = 0;                  // with square_sums
  const double* square_sums = nullptr;  // of each parameter's gradient; nullptr without clipnorm
  Scalar factor = {{1}};
  const float* grad_scale = nullptr;  // what the gradients are divided by first; nullptr without
  double loss_scale_factor = 1;       // what they are divided by then
  const float* found_inf = nullptr;   // nothing is written if it is not zero; nullptr without

  // Whether gradients are taken as they are, or negated.
  bool is_plain() const {
    return clipvalue == std::numeric_limits<double>::infinity() && square_sums == nullptr && !factor.is_tensor &&
           factor.number == 1 && grad_scale == nullptr && loss_scale_factor == 1;
  }
};

// Whether nothing is to be written, where the options can be read.
ADADELTA_INLINE bool is_skipped(const GradientOptions& options) {
  return options.found_inf != nullptr && *options.found_inf != 0;
}

// What becomes of the gradient of parameter `index`, where the options can be read. `factor` is the value of
// options.factor.
template <typename T>
ADADELTA_INLINE GradientClip<T> clip_of(const GradientOptions& options, size_t index, double factor, bool maximize) {
  const auto clip = options.square_sums != nullptr
                        ? GradientClip<T>::by_norm(options.clipvalue, options.clipnorm, options.square_sums[index])
                        : GradientClip<T>::by_factor(options.clipvalue, factor);
  const T scale = options.grad_scale != nullptr ? static_cast<T>(*options.grad_scale) : T(1);
  return clip.scaled_by(scale, static_cast<T>(options.loss_scale_factor)).negated_if(maximize);
}

struct UpdateOptions {
  std::vector<Segment> segments;
  GradientOptions gradient;
};

// ---- Arguments ------------------------------------------------------------------------------------------------------

using OptionalTensor = std::optional<torch::stable::Tensor>;

// Takes the arguments of an op from the dispatcher's stack, one after the other.
class ArgumentReader {
 public:
  explicit ArgumentReader(const StableIValue* stack) : next_(stack) {}

  TensorList tensors() { return TensorList(*next_++); }
  OptionalTensor optional_tensor() { return read<OptionalTensor>(); }
  std::vector<OptionalTensor> optional_tensors() { return read<std::vector<OptionalTensor>>(); }
  double number() { return read<double>(); }
  std::optional<double> optional_number() { return read<std::optional<double>>(); }
  std::vector<double> numbers() { return read<std::vector<double>>(); }
  int64_t integer() { return read<int64_t>(); }
  std::vector<int64_t> integers() { return read<std::vector<int64_t>>(); }
  bool boolean() { return read<bool>(); }

 private:
  template <typename T>
  T read() {
    return torch::stable::detail::to<T>(*next_++);
  }

  const StableIValue* next_;
};

// Where the parameters are.
struct DeviceId {
  int32_t device_type;
  int32_t device_index;

  const char* name() const { return device_type == aoti_torch_device_type_cpu() ? "CPU" : "CUDA"; }

  bool holds(const torch::stable::Tensor& tensor) const {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type == device_type && (type == aoti_torch_device_type_cpu() || tensor.get_device_index() == device_index);
  }
};

// Uninitialised numbers.
inline torch::stable::Tensor new_vector(int64_t count, int32_t dtype, const DeviceId& device) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &count, &stride, dtype, device.device_type, device.device_index, &handle)
  );
  return torch::stable::Tensor(handle);
}

namespace detail {

// `name`: how messages call the tensor.
template <typename... Name>
void check_one_element(const torch::stable::Tensor& tensor, const DeviceId& device, const Name&... name) {
  if (tensor.numel() != 1 || !device.holds(tensor)) {
    refuse_call(name..., " must be a ", device.name(), " tensor of one element, on the device of the parameters");
  }
}

template <typename... Name>
const void* data_of(const torch::stable::Tensor& tensor, const Name&... name) {
  const void* data = tensor.const_data_ptr();
  if (is_null(data) && tensor.numel() > 0) {
    refuse_call(name..., " has no memory: its storage was resized");
  }
  return data;
}

inline const float* float_data(const OptionalTensor& tensor, const char* name, const DeviceId& device) {
  if (!tensor.has_value()) {
    return nullptr;
  }
  check_one_element(*tensor, device, name);
  if (tensor->scalar_type() != torch::headeronly::ScalarType::Float) {
    refuse_call(name, " must have the dtype float32");
  }
  return static_cast<const float*>(data_of(*tensor, name));
}

template <typename... Name>
Scalar scalar(double number, const OptionalTensor& tensor, const DeviceId& device, const Name&... name) {
  Scalar result;
  if (!tensor.has_value()) {
    result.number = number;
    return result;
  }
  check_one_element(*tensor, device, name...);
  result.is_tensor = true;
  result.data = data_of(*tensor, name...);
  switch (tensor->scalar_type()) {
    case torch::headeronly::ScalarType::Double:
      result.dtype = Dtype::kFloat64;
      break;
    case torch::headeronly::ScalarType::Float:
      result.dtype = Dtype::kFloat32;
      break;
    case torch::headeronly::ScalarType::Half:
      result.dtype = Dtype::kFloat16;
      break;
    case torch::headeronly::ScalarType::BFloat16:
      result.dtype = Dtype::kBFloat16;
      break;
    default:
      refuse_call(name..., " must have a floating-point dtype");
  }
  return result;
}

// Refuses a clipvalue, infinite where there is none, that cannot be applied.
inline void check_clipvalue(double clipvalue, const CallInfo& info) {
  if (!(clipvalue >= 0)) {
    refuse_call("clipvalue must be a number >= 0, got ", clipvalue);
  }
  if (clipvalue < std::numeric_limits<double>::infinity() && info.complex_param >= 0) {
    refuse(info.complex_param, "clipvalue is ", clipvalue, ", but it is complex, and has no order to clamp in");
  }
}

}  // namespace detail

constexpr const char* kHyperparameterNames[kSegmentNumbers] = {
    "lr",
    "rho",
    "epsilon",
    "maximize",
    "weight_decay",
    "is_decoupled",
    "ema_momentum",
    "overwrites",
    "state_dtype",
    "has_masters"
};

// The hyperparameters and options of an update, which the schemas of its ops have in common.
class OptionArguments {
 public:
  explicit OptionArguments(ArgumentReader& reader)
      : sizes_(reader.integers()),
        numbers_(reader.numbers()),
        tensors_(reader.optional_tensors()),
        clipvalue_(reader.optional_number()),
        clipnorm_(reader.optional_number()),
        square_sums_(reader.optional_tensor()),
        factor_number_(reader.number()),
        factor_(reader.optional_tensor()),
        grad_scale_(reader.optional_tensor()),
        loss_scale_factor_(reader.number()),
        found_inf_(reader.optional_tensor()),
        check_only_(reader.boolean()) {
    read_state_formats();
  }
  OptionArguments(const OptionArguments&) = delete;
  OptionArguments& operator=(const OptionArguments&) = delete;

  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<StateFormat>& state_formats() const { return state_formats_; }
  bool check_only() const { return check_only_; }

  // What they say to an update of `param_count` parameters. Refuses what does not fit together and with them.
  UpdateOptions read(const DeviceId& device, const CallInfo& info, size_t param_count) const {
    UpdateOptions options;
    read_segments(device, options.segments);
    GradientOptions& gradient = options.gradient;
    gradient.clipvalue = clipvalue_.value_or(std::numeric_limits<double>::infinity());
    gradient.clipnorm = clipnorm_.value_or(0);
    gradient.factor = detail::scalar(factor_number_, factor_, device, "factor_tensor");
    gradient.grad_scale = detail::float_data(grad_scale_, "grad_scale", device);
    gradient.loss_scale_factor = loss_scale_factor_;
    gradient.found_inf = detail::float_data(found_inf_, "found_inf", device);
    detail::check_clipvalue(gradient.clipvalue, info);
    check_clipnorm(device, param_count);
    if (square_sums_.has_value()) {
      gradient.square_sums = static_cast<const double*>(detail::data_of(*square_sums_, "square_sums"));
    }
    return options;
  }

 private:
  void read_state_formats() {
    const size_t count = sizes_.size() * kSegmentNumbers;
    if (numbers_.size() != count || (!tensors_.empty() && tensors_.size() != count)) {
      refuse_call(
          sizes_.size(),
          " segments have ",
          numbers_.size(),
          " hyperparameters and ",
          tensors_.size(),
          " hyperparameter_tensors, but must have ",
          count,
          " and as many, or none"
      );
    }
    for (size_t segment = 0; segment < sizes_.size(); ++segment) {
      // One of the whole numbers from 0 to below `end`.
      const auto choice = [&](int which, int end, const char* choices) {
        const size_t place = segment * kSegmentNumbers + which;
        const double number = numbers_[place];
        const bool is_tensor = !tensors_.empty() && tensors_[place].has_value();
        if (is_tensor || !(number >= 0 && number < end) || number != static_cast<int>(number)) {
          refuse_call(
              "the ", kHyperparameterNames[which], " of segment ", segment, " must be ", choices, ", and no tensor"
          );
        }
        return static_cast<int>(number);
      };
      const int dtype = choice(kStateDtype, StateFormat::kStateDtypes, "0, 1 or 2");
      const bool has_masters = choice(kHasMasters, 2, "0 or 1") != 0;
      state_formats_.push_back({static_cast<StateFormat::StateDtype>(dtype), has_masters});
    }
  }

  void read_segments(const DeviceId& device, std::vector<Segment>& segments) const {
    segments.resize(sizes_.size());
    for (size_t k = 0; k < numbers_.size(); ++k) {
      const size_t which = k % kSegmentNumbers, segment = k / kSegmentNumbers;
      if (which >= kHyperparameters) {
        continue;
      }
      const char* name = kHyperparameterNames[which];
      static const OptionalTensor none;
      const OptionalTensor& tensor = tensors_.empty() ? none : tensors_[k];
      const bool is_flag = which == kMaximize || which == kIsDecoupled || which == kOverwrites;
      if (is_flag && (tensor.has_value() || (numbers_[k] != 0 && numbers_[k] != 1))) {
        refuse_call("the ", name, " of segment ", segment, " must be 0 or 1, and no tensor");
      }
      segments[segment].set(which, detail::scalar(numbers_[k], tensor, device, "the ", name, " of segment ", segment));
    }
  }

  void check_clipnorm(const DeviceId& device, size_t param_count) const {
    if (clipnorm_.has_value() != square_sums_.has_value()) {
      refuse_call("clipnorm and square_sums must be given together");
    }
    if (!clipnorm_.has_value()) {
      return;
    }
    if (!(*clipnorm_ >= 0)) {
      refuse_call("clipnorm must be a number >= 0, got ", *clipnorm_);
    }
    if (factor_.has_value() || factor_number_ != 1) {
      refuse_call("clipnorm is ", *clipnorm_, ", but a factor is given, too");
    }
    const auto& sums = *square_sums_;
    if (!device.holds(sums) || sums.scalar_type() != torch::headeronly::ScalarType::Double || sums.dim() != 1 ||
        sums.numel() != static_cast<int64_t>(param_count) || !sums.is_contiguous()) {
      refuse_call(
          "square_sums must be a contiguous float64 ",
          device.name(),
          " tensor with one element for each of ",
          param_count,
          " parameters"
      );
    }
  }

  std::vector<int64_t> sizes_;
  std::vector<double> numbers_;
  std::vector<OptionalTensor> tensors_;
  std::optional<double> clipvalue_, clipnorm_;
  OptionalTensor square_sums_;
  double factor_number_;
  OptionalTensor factor_, grad_scale_;
  double loss_scale_factor_;
  OptionalTensor found_inf_;
  bool check_only_;
  std::vector<StateFormat> state_formats_;  // of each segment
};

// Owns what the dispatcher handed over to adadelta_.
class UpdateArguments {
 public:
  UpdateArguments(ArgumentReader reader, Workspace& workspace, int32_t device_type)
      : workspace_(workspace),
        params_(reader.tensors()),
        grads_(reader.tensors()),
        states_{reader.tensors(), reader.tensors()},
        optionals_{reader.tensors(), reader.tensors()},
        given_(reader) {
    const Lists<TensorList> lists{params_, grads_, states_, {&optionals_[0], &optionals_[1]}};
    read_entries(workspace, lists, given_.sizes(), given_.state_formats(), device_type);
    options_ = given_.read({device_type, workspace.device_index}, workspace, params_.size());
  }
  UpdateArguments(const UpdateArguments&) = delete;
  UpdateArguments& operator=(const UpdateArguments&) = delete;
  ~UpdateArguments() { gil_.emplace(); }

  const Workspace& workspace() const { return workspace_; }
  const UpdateOptions& options() const { return options_; }
  bool check_only() const { return given_.check_only(); }

 private:
  const Workspace& workspace_;
  std::optional<HeldGil> gil_;  // before what is destroyed while it is held
  TensorList params_, grads_;
  TensorList states_[kStates];
  TensorList optionals_[kOptionals];
  OptionArguments given_;
  UpdateOptions options_;
};

// Owns what the dispatcher handed over to grad_square_sums.
class SquareSumArguments {
 public:
  SquareSumArguments(ArgumentReader reader, Gradients& gradients, int32_t device_type)
      : params_(reader.tensors()),
        grads_(reader.tensors()),
        clipvalue_(reader.optional_number().value_or(std::numeric_limits<double>::infinity())),
        in_double_(reader.boolean()),
        grad_scale_(reader.optional_tensor()),
        loss_scale_factor_(reader.number()) {
    read_gradients(gradients, params_, grads_, in_double_, device_type);
    device_ = {device_type, gradients.device_index};
    grad_scale_data_ = detail::float_data(grad_scale_, "grad_scale", device_);
    detail::check_clipvalue(clipvalue_, gradients);
  }
  SquareSumArguments(const SquareSumArguments&) = delete;
  SquareSumArguments& operator=(const SquareSumArguments&) = delete;
  ~SquareSumArguments() { gil_.emplace(); }

  double clipvalue() const { return clipvalue_; }
  const float* grad_scale() const { return grad_scale_data_; }
  double loss_scale_factor() const { return loss_scale_factor_; }

  // Uninitialised numbers beside the parameters.
  torch::stable::Tensor new_doubles(int64_t count) const {
    return new_vector(count, aoti_torch_dtype_float64(), device_);
  }

  torch::stable::Tensor new_result() const { return new_doubles(static_cast<int64_t>(params_.size())); }

 private:
  std::optional<HeldGil> gil_;  // before what is destroyed while it is held
  TensorList params_, grads_;
  double clipvalue_;
  bool in_double_;
  OptionalTensor grad_scale_;
  double loss_scale_factor_;
  DeviceId device_;
  const float* grad_scale_data_;
};

}  // namespace torch_adadelta
