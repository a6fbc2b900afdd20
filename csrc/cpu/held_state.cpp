// Keeps held state, and gives it its numbers.
#include "held_state.h"

#include "parallel.h"

#include <unordered_map>
#include <utility>

namespace torch_adadelta::cpu {
namespace {

// From how many parameters on, of how many elements on the average, it pays to have a second thread look at their
// state. What PyTorch knows of smaller tensors lies among their elements, which the first thread may just have written.
constexpr int64_t kMany = 64;
constexpr int64_t kLarge = 256;

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<HeldState>> states;
  int64_t last = 0;
};

// Never destroyed: at the end of the process there may be no interpreter left to give tensors back to.
Registry& registry() {
  static auto* const result = new Registry;
  return *result;
}

// hold_state in ops.cpp.
void hold_state(StableIValue* stack, uint64_t, uint64_t) {
  auto state = std::make_shared<HeldState>(stack[0], stack[1]);
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.states.emplace(++all.last, std::move(state));
  stack[0] = torch::stable::detail::from(all.last);
}

// drop_state in ops.cpp. Who uses the state at the moment keeps it that long.
void drop_state(int64_t number) {
  std::shared_ptr<HeldState> state;
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.states.find(number);
    if (found != all.states.end()) {
      state = std::move(found->second);
      all.states.erase(found);
    }
  }
  const HeldGil gil;
  state.reset();
}

}  // namespace

// ---- What is known --------------------------------------------------------------------------------------------------

void KnownTensors::look(const char* list_name) {
  infos_.clear();
  dimensions_.clear();
  numel_ = 0;
  std::vector<TensorInfo> infos;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorInfo& info = infos.emplace_back(tensors_.info(i, list_name, true));
    dimensions_.insert(dimensions_.end(), info.sizes, info.sizes + info.dim);
    dimensions_.insert(dimensions_.end(), info.strides, info.strides + info.dim);
    numel_ += info.numel;
  }
  const int64_t* own = dimensions_.data();
  for (TensorInfo& info : infos) {
    info.sizes = own;
    info.strides = own + info.dim;
    own += 2 * info.dim;
  }
  infos_ = std::move(infos);
}

bool KnownTensors::are_as_known() const {
  if (infos_.size() != tensors_.size()) {
    return false;
  }
  for (size_t i = 0; i < infos_.size(); ++i) {
    if (!tensors_.is_still(i, infos_[i])) {
      return false;
    }
  }
  return true;
}

const Entries& HeldState::read(const TensorList& params, const TensorList& grads) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  const std::lock_guard<std::mutex> lock(mutex_);

  // Another thread looks at the state, while this one, which gets the first range, reads on as if it had not changed.
  // What fails meanwhile need not be wrong: PyTorch lets nobody write to a lazy clone in a parallel region, for that
  // copies it. So it is read again afterwards.
  bool is_known = false;
  const Entries* entries = nullptr;
  const int64_t count = static_cast<int64_t>(square_avgs_.size()), numel = square_avgs_.numel();
  if (count >= kMany && numel >= kLarge * count && numel > kGrain && torch::stable::get_num_threads() > 1) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) {
        try {
          entries = &read_entries(params, grads, square_avgs_, acc_deltas_, cpu);
        } catch (...) {  // `entries` stays without any
        }
      }
      if (end == 2) {
        is_known = is_as_known();
      }
    });
    if (is_known && entries != nullptr) {
      return *entries;
    }
  }

  if (is_as_known()) {
    return read_entries(params, grads, square_avgs_, acc_deltas_, cpu);
  }
  const Entries& found = read_entries(params, grads, square_avgs_.tensors(), acc_deltas_.tensors(), cpu);
  square_avgs_.look("square_avgs");
  acc_deltas_.look("acc_deltas");
  return found;
}

std::shared_ptr<HeldState> held_state(int64_t number) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.states.find(number);
  if (found == all.states.end()) {
    fail("no state is held under the number ", number);
  }
  return found->second;
}

}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) { m.impl("hold_state", torch_adadelta::cpu::hold_state); }

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CompositeExplicitAutograd, m) {
  m.impl("drop_state", TORCH_BOX(&torch_adadelta::cpu::drop_state));
}
