// Keeps cached accumulators, and gives them their numbers.
#include "accumulator_cache.h"

#include "parallel.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace torch_adadelta::cpu {
namespace {

// From how many parameters on, of how many elements on the average, it pays to have a second thread look at their
// accumulators. What PyTorch knows of smaller tensors lies among their elements, which the first thread may just have
// written.
constexpr int64_t kMany = 64;
constexpr int64_t kLarge = 256;

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
  numel_ = 0;
  std::vector<TensorInfo> infos;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorInfo& info = infos.emplace_back(tensors_.info(i, name, true));
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
    : states_{CachedTensorInfo(reader), CachedTensorInfo(reader)} {
  std::pair<size_t, const char*> lengths[kStates];
  for (int state = 0; state < kStates; ++state) {
    lengths[state] = {states_[state].tensors().size(), kListNames[kFirstState + state]};
  }
  check_lengths(lengths);
}

bool AccumulatorCache::is_as_known() const {
  return std::all_of(states_, states_ + kStates, [](const CachedTensorInfo& state) { return state.are_as_known(); });
}

const Workspace& AccumulatorCache::read(
    const TensorList& params, const TensorList& grads, const std::vector<int64_t>& sizes
) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  Lists<CachedTensorInfo> known{params, grads, {}};
  Lists<TensorList> lists{params, grads, {}};
  for (int state = 0; state < kStates; ++state) {
    known.states[state] = &states_[state];
    lists.states[state] = &states_[state].tensors();
  }

  // Another thread looks at the accumulators, while this one, which gets the first range, reads on as if they had not
  // changed. What fails meanwhile need not be wrong: PyTorch lets nobody write to a lazy clone in a parallel region,
  // for that copies it. So it is read again afterwards.
  bool is_known = false, is_read = false;
  const int64_t count = static_cast<int64_t>(states_[0].size()), numel = states_[0].numel();
  if (count >= kMany && numel >= kLarge * count && numel > kGrain && torch::stable::get_num_threads() > 1) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) {
        try {
          read_entries(workspace_, known, sizes, cpu);
          is_read = true;
        } catch (...) {  // it stays unread
        }
      }
      if (end == 2) {
        is_known = is_as_known();
      }
    });
    if (is_known && is_read) {
      return workspace_;
    }
  }

  if (is_as_known()) {
    read_entries(workspace_, known, sizes, cpu);
  } else {
    read_entries(workspace_, lists, sizes, cpu);
    for (int state = 0; state < kStates; ++state) {
      states_[state].look(kOwnNames[kFirstState + state]);
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
      workspace_(&cache_->read(params_, grads_, given_.sizes())),
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
