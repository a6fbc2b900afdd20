// Keeps held state, and gives it its numbers.
#include "held_state.h"

#include <mutex>
#include <unordered_map>
#include <utility>

namespace torch_adadelta {
namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const HeldState>> states;
  int64_t last = 0;
};

// Never destroyed: at the end of the process there may be no interpreter left to give tensors back to.
Registry& registry() {
  static auto* const result = new Registry;
  return *result;
}

// hold_state in ops.cpp.
void hold_state(StableIValue* stack, uint64_t, uint64_t) {
  auto state = std::make_shared<const HeldState>(stack[0], stack[1]);
  check_lengths({{state->square_avgs, "square_avgs"}, {state->acc_deltas, "acc_deltas"}});
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.states.emplace(++all.last, std::move(state));
  stack[0] = torch::stable::detail::from(all.last);
}

// drop_state in ops.cpp. Who uses the state at the moment keeps it that long.
void drop_state(int64_t number) {
  std::shared_ptr<const HeldState> state;
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

std::shared_ptr<const HeldState> held_state(int64_t number) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.states.find(number);
  if (found == all.states.end()) {
    fail("no state is held under the number ", number);
  }
  return found->second;
}

}  // namespace torch_adadelta

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) { m.impl("hold_state", torch_adadelta::hold_state); }

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CompositeExplicitAutograd, m) {
  m.impl("drop_state", TORCH_BOX(&torch_adadelta::drop_state));
}
