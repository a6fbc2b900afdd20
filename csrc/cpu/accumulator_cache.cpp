// Keeps cached accumulators, and gives them their numbers.
#include "accumulator_cache.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace torch_adadelta::cpu {
namespace {

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<AccumulatorCache>> caches;
  int64_t last = 0;
};

// Never destroyed: at the end of the process there may be no interpreter left to give tensors back to.
Registry& registry() {
  static auto* const result = new Registry;
  return *result;
}

// The accumulators with this number.
std::shared_ptr<AccumulatorCache> find_cache(int64_t number) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.caches.find(number);
  if (found == all.caches.end()) {
    refuse_call("no accumulators are cached under the number ", number);
  }
  return found->second;
}

// cache_accumulators in ops.cpp.
void cache_accumulators(StableIValue* stack, uint64_t, uint64_t) {
  before_writing([&] {
    auto cache = std::make_shared<AccumulatorCache>(ArgumentReader(stack));
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.caches.emplace(++all.last, std::move(cache));
    stack[0] = torch::stable::detail::from(all.last);
  });
}

// drop_accumulators in ops.cpp. Who uses them at the moment keeps them that long.
void drop_accumulators(int64_t number) {
  std::shared_ptr<AccumulatorCache> cache;
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.caches.find(number);
    if (found != all.caches.end()) {
      cache = std::move(found->second);
      all.caches.erase(found);
    }
  }
  const HeldGil gil;
  cache.reset();
}

}  // namespace

// ---- What is known --------------------------------------------------------------------------------------------------

void CachedTensorInfo::look(const char* name) {
  infos_.clear();
  dimensions_.clear();
  std::vector<TensorInfo> infos;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorInfo& info = infos.emplace_back(tensors_.info(i, name, true));
    dimensions_.insert(dimensions_.end(), info.sizes, info.sizes + info.dim);
    dimensions_.insert(dimensions_.end(), info.strides, info.strides + info.dim);
  }
  const int64_t* own = dimensions_.data();
  for (TensorInfo& info : infos) {
    info.sizes = own;
    info.strides = own + info.dim;
    own += 2 * info.dim;
  }
  infos_ = std::move(infos);
}

bool CachedTensorInfo::are_as_known() const {
  if (infos_.size() != tensors_.size()) {
    return false;
  }
  for (size_t i = 0; i < infos_.size(); ++i) {
    tensors_.prefetch_after(i);
    if (!tensors_.is_still(i, infos_[i])) {
      return false;
    }
  }
  return true;
}

AccumulatorCache::AccumulatorCache(ArgumentReader reader)
    : states_{reader.tensors(), reader.tensors()}, known_{CachedTensorInfo(states_[0]), CachedTensorInfo(states_[1])} {
  std::pair<size_t, const char*> lengths[kStates];
  for (int state = 0; state < kStates; ++state) {
    lengths[state] = {states_[state].size(), kListNames[kFirstState + state]};
  }
  check_lengths(lengths);
}

const Workspace& AccumulatorCache::read(
    const TensorList& params, const TensorList& grads, const OptionArguments& given
) {
  const auto read_with = [&](const auto* states) {
    using StateList = std::remove_cvref_t<decltype(*states)>;
    const Lists<StateList> lists{params, grads, states};
    read_entries(workspace_, lists, given.sizes(), given.state_formats(), aoti_torch_device_type_cpu());
  };
  if (std::all_of(known_, known_ + kStates, [](const CachedTensorInfo& state) { return state.are_as_known(); })) {
    read_with(known_);
  } else {
    read_with(states_);
    for (int state = 0; state < kStates; ++state) {
      known_[state].look(kOwnNames[kFirstState + state]);
    }
  }
  return workspace_;
}

CachedUpdateArguments::CachedUpdateArguments(ArgumentReader reader)
    : params_(reader.tensors()),
      grads_(reader.tensors()),
      number_(reader.integer()),
      given_(reader),
      cache_(find_cache(number_)),
      lock_(cache_->mutex()),
      workspace_(&cache_->read(params_, grads_, given_)),
      options_(given_.read({aoti_torch_device_type_cpu(), workspace_->device_index}, *workspace_, params_.size())) {}

CachedUpdateArguments::~CachedUpdateArguments() {
  lock_.unlock();
  gil_.emplace();
}

}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) {
  m.impl("cache_accumulators", torch_adadelta::cpu::cache_accumulators);
}

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CompositeExplicitAutograd, m) {
  m.impl("drop_accumulators", TORCH_BOX(&torch_adadelta::cpu::drop_accumulators));
}
