// Two CUDA devices for a PyTorch without CUDA: what is made on them lies in the memory of the host, and operators run
// those of the CPU on it. So the tests for a GPU run where there is none, and what the optimizer does with tensors that
// it may not read is tried. Waiting is as little real as the devices, but what would wait is known by its name.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using c10::Device;
using c10::IValue;

constexpr c10::DeviceIndex kDevices = 2;

thread_local c10::DeviceIndex current_device = 0;
std::atomic<int64_t> allocated{0}, most_allocated{0};
std::atomic<bool> forbids_waiting{false};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(c10::kCUDA, current_device); }
  void setDevice(Device device) const override { current_device = device.has_index() ? device.index() : 0; }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return Guard().getDevice().index(); }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { Guard().setDevice(Device(c10::kCUDA, device)); }
  c10::DeviceIndex getCurrentDevice() const override { return Guard().getDevice().index(); }
};

// ---- Memory ---------------------------------------------------------------------------------------------------------

struct Allocation {
  c10::DataPtr data;
  int64_t bytes;

  static void free(void* self) {
    auto* allocation = static_cast<Allocation*>(self);
    allocated -= allocation->bytes;
    delete allocation;
  }
};

// Makes memory of the host memory of a device, and counts it as the allocator of CUDA would: in blocks of 512 bytes.
void adopt(c10::StorageImpl& storage, Device device) {
  if (storage.device_type() == c10::kCUDA) {
    return;
  }
  const auto bytes = static_cast<int64_t>((storage.nbytes() + 511) / 512 * 512);
  void* memory = storage.mutable_data();
  auto* allocation = new Allocation{c10::DataPtr(), bytes};
  allocation->data = storage.set_data_ptr(c10::DataPtr(memory, allocation, &Allocation::free, device));
  allocated += bytes;
  int64_t most = most_allocated;
  while (allocated > most && !most_allocated.compare_exchange_weak(most, allocated)) {
  }
}

// ---- Operators ------------------------------------------------------------------------------------------------------

// Would make the host wait for the device.
bool waits(const std::string& name, const std::vector<IValue>& arguments) {
  if (name == "aten::copy_") {
    const auto& to = arguments[0].toTensor();
    const auto& from = arguments[1].toTensor();
    return to.device().type() != from.device().type() && !arguments[2].toBool();
  }
  static const std::vector<std::string> names{
      "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"
  };
  return std::find(names.begin(), names.end(), name) != names.end();
}

// One operator, whose tensors of a device are replaced by ones of the CPU with the same memory, and back.
class Call {
 public:
  IValue to_cpu(const IValue& value) {
    if (value.isTensor()) {
      return on_cpu(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(on_cpu(tensor));
      }
      return list;
    }
    if (value.isList() && value.toListRef().size() > 0 &&
        value.type()->castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::OptionalType) {
      c10::List<std::optional<at::Tensor>> list;
      for (const IValue& item : value.toListRef()) {
        list.push_back(item.isTensor() ? std::optional(on_cpu(item.toTensor())) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice()) {
      see(value.toDevice());
      return Device(c10::kCPU);
    }
    return value;
  }

  IValue back(const IValue& value) {
    if (value.isTensor()) {
      return on_device(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(on_device(tensor));
      }
      return list;
    }
    return value;
  }

  // What an operator did to the tensors that it was given, besides writing to them.
  void settle() {
    for (auto& [cpu, pair] : tensors_) {
      auto& [alias, original] = pair;
      auto* impl = original.unsafeGetTensorImpl();
      if (alias.storage().data() != original.storage().data()) {
        adopt(*alias.storage().unsafeGetStorageImpl(), original.device());
        impl->set_storage_keep_dtype(alias.storage());
      }
      if (alias.sizes() != original.sizes() || alias.strides() != original.strides() ||
          alias.storage_offset() != original.storage_offset()) {
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
      }
    }
  }

  // As CUDA has it: all on one device, but numbers.
  void check(const std::string& name) const {
    TORCH_CHECK(
        !differs_ || name == "aten::copy_", "Expected all tensors to be on the same device, but found several: ", name
    );
  }

 private:
  void see(Device device) {
    if (device.type() != c10::kCUDA) {
      return;
    }
    const c10::DeviceIndex index = device.has_index() ? device.index() : current_device;
    TORCH_CHECK(index < kDevices, "there is no device ", index);
    differs_ |= index_.has_value() && *index_ != index;
    index_ = index_.value_or(index);
  }

  at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (tensor.device().type() != c10::kCUDA) {
      has_cpu_ |= tensor.dim() > 0;
      differs_ |= has_cpu_ && index_.has_value();
      tensors_.emplace(tensor.unsafeGetTensorImpl(), std::make_pair(tensor, tensor));
      return tensor;
    }
    see(tensor.device());
    differs_ |= has_cpu_;
    auto& storage = storages_[tensor.storage().unsafeGetStorageImpl()];
    if (!storage) {
      storage = host_view(tensor.storage());
      originals_.emplace(storage.unsafeGetStorageImpl(), tensor.storage());
    }
    const at::Tensor alias = view(storage, c10::DispatchKey::CPU, tensor);
    tensors_.emplace(alias.unsafeGetTensorImpl(), std::make_pair(alias, tensor));
    return alias;
  }

  at::Tensor on_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) {
      return tensor;
    }
    if (const auto found = tensors_.find(tensor.unsafeGetTensorImpl()); found != tensors_.end()) {
      return found->second.second;
    }
    if (const auto found = originals_.find(tensor.storage().unsafeGetStorageImpl()); found != originals_.end()) {
      return view(found->second, c10::DispatchKey::CUDA, tensor);
    }
    adopt(*tensor.storage().unsafeGetStorageImpl(), Device(c10::kCUDA, index_.value_or(current_device)));
    return view(tensor.storage(), c10::DispatchKey::CUDA, tensor);
  }

  static c10::Storage host_view(const c10::Storage& storage) {
    auto* owner = new c10::Storage(storage);
    const auto free = [](void* context) { delete static_cast<c10::Storage*>(context); };
    c10::DataPtr data(storage.unsafeGetStorageImpl()->mutable_data(), owner, free, Device(c10::kCPU));
    return c10::Storage(
        c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(c10::kCPU), true
    );
  }

  static at::Tensor view(const c10::Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
    auto impl = c10::make_intrusive<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
    impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    at::Tensor result(impl);
    result._set_conj(like.is_conj());
    result._set_neg(like.is_neg());
    return result;
  }

  // By what stands for them on the CPU.
  std::unordered_map<const c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> tensors_;
  std::unordered_map<const c10::StorageImpl*, c10::Storage> originals_;
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages_;  // the other way round
  std::optional<c10::DeviceIndex> index_;
  bool has_cpu_ = false;
  bool differs_ = false;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      name.rfind("torch_adadelta::", 0) != 0, "Could not run '", name, "' with arguments from the 'CUDA' backend"
  );
  const size_t count = op.schema().arguments().size();
  std::vector<IValue> arguments(stack->end() - count, stack->end());
  if (forbids_waiting && waits(name, arguments)) {
    TORCH_CHECK(false, "called a synchronizing CUDA operation: ", name);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  Call call;
  for (size_t i = 0; i < count; ++i) {
    (*stack)[stack->size() - count + i] = call.to_cpu(arguments[i]);
  }
  call.check(name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  const size_t results = op.schema().returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    (*stack)[i] = call.back((*stack)[i]);
  }
}

// ---- What CUDA computes otherwise
// ------------------------------------------------------------------------------------

// The root is that of IEEE 754, which it is not in MKL.
at::Tensor& exact_sqrt(const at::Tensor& x, at::Tensor& out) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "sqrt of ", x.scalar_type());
  out.resize_(x.sizes());
  const at::Tensor from = x.contiguous(), to = from.clone();
  const auto run = [&](auto* items) {
    for (int64_t i = 0; i < to.numel(); ++i) {
      items[i] = std::sqrt(items[i]);
    }
  };
  x.scalar_type() == at::kFloat ? run(to.mutable_data_ptr<float>()) : run(to.mutable_data_ptr<double>());
  return out.copy_(to);
}

// A number on the host does not divide: its reciprocal, rounded, multiplies.
at::Tensor& divide(const at::Tensor& x, const at::Tensor& y, at::Tensor& out) {
  if (y.device().is_cpu() && y.dim() == 0 && at::isFloatingType(out.scalar_type())) {
    const double number = y.item<double>();
    const double inverse = out.scalar_type() == at::kDouble ? 1 / number : 1 / static_cast<float>(number);
    return at::mul_out(out, x, at::scalar_tensor(inverse, out.scalar_type()));
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::div", "out");
  torch::jit::Stack stack{x, y, out};
  run_on_cpu(op, &stack);
  return out;
}

int64_t memory(bool is_peak) { return is_peak ? most_allocated : allocated; }

int64_t reset_peak() { return most_allocated = allocated.load(); }

int64_t forbid_waiting(bool forbids) { return forbids_waiting = forbids; }

int64_t exchange_device(int64_t index) {
  const int64_t before = current_device;
  current_device = static_cast<c10::DeviceIndex>(index < 0 ? before : index);
  return before;
}

}  // namespace

extern "C" int fake_cuda_current_device() { return current_device; }

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)  // by this name PyTorch asks for it
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

// Some operators have one implementation for all devices, which would look for the code of CUDA by itself.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) {
      continue;
    }
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    // Those on lists call the others.
    if (!op.has_value() || !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
        name.name.rfind("aten::_foreach", 0) == 0) {
      continue;
    }
    const auto& arguments = op->schema().arguments();
    const bool chooses_device = std::any_of(arguments.begin(), arguments.end(), [](const c10::Argument& argument) {
      return argument.name() == "device";
    });
    if (!chooses_device) {
      m.impl(toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    }
  }
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("sqrt.out", TORCH_FN(exact_sqrt));
  m.impl("div.out", TORCH_FN(divide));
}

TORCH_LIBRARY(fake_cuda, m) {
  m.def("memory(bool is_peak) -> int", &memory);
  m.def("reset_peak() -> int", &reset_peak);
  m.def("forbid_waiting(bool forbids) -> int", &forbid_waiting);
  m.def("exchange_device(int index) -> int", &exchange_device);
}
