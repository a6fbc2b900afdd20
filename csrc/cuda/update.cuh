// The dense update on the GPU: kernels, and below them what chooses and launches them.
//
// `Device` stands for what the code needs of CUDA: device.h in the library, an emulator in the tests. No kernel is
// named beside a <<<>>>, so that a C++ compiler can read this file, too.
#pragma once

#include "../adadelta.h"
#include "../arguments.h"
#include "tables.h"

#include <algorithm>

namespace torch_adadelta::cuda {

// Elements that a block works on.
constexpr int64_t kChunk = 16384;

template <int capacity>
struct UpdateTable {
  UpdateOptions options;
  Chunks<capacity> chunks;
  uint32_t index[capacity];  // of the parameter in the lists
  char* param[capacity];
  char* grad[capacity];
  char* square_avg[capacity];
  char* acc_delta[capacity];
  int64_t numel[capacity];
  Dtype grad_dtype[capacity];
};

static_assert(sizeof(UpdateTable<kSmallTable>) <= 4096 && sizeof(UpdateTable<kLargeTable>) <= kParameterBytes);

// One parameter that is not dense. Strides are those of param, grad, square_avg and acc_delta.
struct StridedUpdate {
  UpdateOptions options;
  Strides<4> strides;
  char* param;
  char* grad;
  char* square_avg;
  char* acc_delta;
  int64_t numel;
  uint32_t index;
  Dtype dtype;
  Dtype grad_dtype;
};

// ---- Kernels --------------------------------------------------------------------------------------------------------

// What becomes of a gradient of parameter `index`. A kernel for plain options does without all but the sign.
template <typename T, bool plain>
struct GradientPipeline {
  bool negates;

  __device__ __forceinline__ GradientPipeline(const UpdateOptions& options, uint32_t) : negates(options.maximize) {}

  __device__ __forceinline__ T operator()(T g) const { return negates ? -g : g; }
};

template <typename T>
struct GradientPipeline<T, false> {
  GradientClip<T> clip;
  bool scales;
  bool divides;

  __device__ __forceinline__ GradientPipeline(const UpdateOptions& options, uint32_t index)
      : clip(clip_of<T>(options, index, value_of(options.factor))),
        scales(options.grad_scale != nullptr),
        divides(options.square_sums != nullptr) {}

  // clip(g), but no division by 1.
  __device__ __forceinline__ T operator()(T g) const {
    if (scales) {
      g = clip.unscaled(g);
    }
    return divides ? clip.divided(g) : clip.undivided(g);
  }
};

template <typename T>
__device__ __forceinline__ Hyperparameters<T> hyperparameters(const UpdateOptions& options) {
  return {value_of(options.lr), value_of(options.rho), value_of(options.epsilon)};
}

// How gradients of the parameter's dtype are read, and those of any other.
template <typename Item>
struct SameDtype {
  const Item* grad;

  template <int count, typename T>
  __device__ __forceinline__ void load(int64_t at, T (&g)[count]) const {
    const auto vector = load_vector<count>(grad + at);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      g[k] = widen<T>(vector.items[k]);
    }
  }
};

struct AnyDtype {
  const char* grad;
  Dtype dtype;

  template <int count, typename T>
  __device__ __forceinline__ void load(int64_t at, T (&g)[count]) const {
    with_items(grad, dtype, [&](const auto* items) {
      const auto vector = load_vector<count>(items + at);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        g[k] = widen<T>(vector.items[k]);
      }
    });
  }
};

// `count` neighbours, from index `at` on. The gradient may be the parameter: all is read before anything is written.
template <int count, typename Item, typename Gradient, typename Pipeline, typename T>
__device__ __forceinline__ void update_vector(
    Item* param,
    const Gradient& gradient,
    Item* square_avg,
    Item* acc_delta,
    int64_t at,
    const Pipeline& pipeline,
    const Hyperparameters<T>& h
) {
  T g[count];
  gradient.load(at, g);
  auto square_avgs = load_vector<count>(square_avg + at);
  auto acc_deltas = load_vector<count>(acc_delta + at);
  auto params = load_vector<count>(param + at);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    T a = widen<T>(square_avgs.items[k]);
    T u = widen<T>(acc_deltas.items[k]);
    T p = widen<T>(params.items[k]);
    adadelta_element(pipeline(g[k]), a, u, p, h);
    square_avgs.items[k] = narrow<Item>(a);
    acc_deltas.items[k] = narrow<Item>(u);
    params.items[k] = narrow<Item>(p);
  }
  store_vector(square_avg + at, square_avgs);
  store_vector(acc_delta + at, acc_deltas);
  store_vector(param + at, params);
}

// The elements [begin, end) of a parameter: vectors first, if all four tensors are aligned, and then one by one.
template <typename Item, typename Gradient, typename Pipeline, typename T>
__device__ __forceinline__ void update_chunk(
    Item* param,
    const Gradient& gradient,
    Item* square_avg,
    Item* acc_delta,
    int64_t begin,
    int64_t end,
    const Pipeline& pipeline,
    const Hyperparameters<T>& h
) {
  constexpr int kVector = kVectorBytes / sizeof(Item);
  if (is_aligned(param) && is_aligned(gradient.grad) && is_aligned(square_avg) && is_aligned(acc_delta)) {
    const int64_t vectors_end = end - end % kVector;
    for (int64_t at = begin + threadIdx.x * kVector; at < vectors_end; at += kThreads * kVector) {
      update_vector<kVector>(param, gradient, square_avg, acc_delta, at, pipeline, h);
    }
    begin = vectors_end;
  }
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    update_vector<1>(param, gradient, square_avg, acc_delta, at, pipeline, h);
  }
}

template <typename Item, bool plain, int capacity>
__global__ void __launch_bounds__(kThreads, sizeof(Item) == 8 ? 1 : 2) update_kernel(
    const UpdateTable<capacity> __grid_constant__ table
) {
  using T = ArithmeticType<Item>;
  if (is_skipped(table.options)) {
    return;
  }
  const int i = table.chunks.find(blockIdx.x);
  const int64_t begin = (blockIdx.x - table.chunks.first_block[i]) * kChunk;
  const int64_t end = begin + kChunk < table.numel[i] ? begin + kChunk : table.numel[i];
  const auto h = hyperparameters<T>(table.options);
  const GradientPipeline<T, plain> pipeline(table.options, table.index[i]);

  auto* param = reinterpret_cast<Item*>(table.param[i]);
  auto* square_avg = reinterpret_cast<Item*>(table.square_avg[i]);
  auto* acc_delta = reinterpret_cast<Item*>(table.acc_delta[i]);
  constexpr Dtype dtype = std::is_same_v<Item, float>    ? Dtype::kFloat32
                          : std::is_same_v<Item, double> ? Dtype::kFloat64
                          : std::is_same_v<Item, __half> ? Dtype::kFloat16
                                                         : Dtype::kBFloat16;
  if (table.grad_dtype[i] == dtype) {
    const SameDtype<Item> gradient{reinterpret_cast<const Item*>(table.grad[i])};
    update_chunk(param, gradient, square_avg, acc_delta, begin, end, pipeline, h);
  } else {
    const AnyDtype gradient{table.grad[i], table.grad_dtype[i]};
    update_chunk(param, gradient, square_avg, acc_delta, begin, end, pipeline, h);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) strided_update_kernel(const StridedUpdate __grid_constant__ update) {
  if (is_skipped(update.options)) {
    return;
  }
  const auto h = hyperparameters<T>(update.options);
  const GradientPipeline<T, false> pipeline(update.options, update.index);
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t end = begin + kChunk < update.numel ? begin + kChunk : update.numel;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    int64_t offsets[4];
    find_offsets(update.strides, at, offsets);
    char* param = update.param + offsets[0];
    char* square_avg = update.square_avg + offsets[2];
    char* acc_delta = update.acc_delta + offsets[3];
    const T g = load_item<T>(update.grad + offsets[1], update.grad_dtype);
    T a = load_item<T>(square_avg, update.dtype);
    T u = load_item<T>(acc_delta, update.dtype);
    T p = load_item<T>(param, update.dtype);
    adadelta_element(pipeline(g), a, u, p, h);
    store_item(square_avg, update.dtype, a);
    store_item(acc_delta, update.dtype, u);
    store_item(param, update.dtype, p);
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

inline int64_t chunks_of(const Entry& entry) { return (entry.numel + kChunk - 1) / kChunk; }

using EntryIterator = std::vector<Entry>::const_iterator;

// Updates the dense entries of one dtype among [first, last) until the table is full, and returns where to go on.
template <typename Item, bool plain, int capacity, typename Device>
EntryIterator update_table(
    const Device& device, EntryIterator first, EntryIterator last, Dtype dtype, const UpdateOptions& options
) {
  UpdateTable<capacity> table;
  table.options = options;
  int64_t blocks = 0;
  for (; first != last; ++first) {
    if (first->layout != nullptr || first->dtype != dtype) {
      continue;
    }
    const int i = table.chunks.add(chunks_of(*first), blocks);
    if (i < 0) {
      break;
    }
    table.index[i] = static_cast<uint32_t>(first->index);
    table.param[i] = first->param;
    table.grad[i] = first->grad;
    table.square_avg[i] = first->square_avg;
    table.acc_delta[i] = first->acc_delta;
    table.numel[i] = first->numel;
    table.grad_dtype[i] = first->grad_dtype;
  }
  device.launch(update_kernel<Item, plain, capacity>, blocks, kThreads, table);
  return first;
}

// Updates the dense entries of one dtype among [first, last).
template <typename Item, typename Device>
void update_dense(
    const Device& device, EntryIterator first, EntryIterator last, Dtype dtype, const UpdateOptions& options
) {
  const auto is_wanted = [&](const Entry& entry) { return entry.layout == nullptr && entry.dtype == dtype; };
  while ((first = std::find_if(first, last, is_wanted)) != last) {
    const bool fits_small = std::count_if(first, last, is_wanted) <= kSmallTable;
    if (options.is_plain()) {
      first = fits_small ? update_table<Item, true, kSmallTable>(device, first, last, dtype, options)
                         : update_table<Item, true, kLargeTable>(device, first, last, dtype, options);
    } else {
      first = fits_small ? update_table<Item, false, kSmallTable>(device, first, last, dtype, options)
                         : update_table<Item, false, kLargeTable>(device, first, last, dtype, options);
    }
  }
}

template <typename Device>
void update_strided(const Device& device, const Entry& entry, const UpdateOptions& options) {
  StridedUpdate update;
  update.options = options;
  copy_layout<&Dimension::param, &Dimension::grad, &Dimension::square_avg, &Dimension::acc_delta>(
      *entry.layout, update.strides
  );
  update.param = entry.param;
  update.grad = entry.grad;
  update.square_avg = entry.square_avg;
  update.acc_delta = entry.acc_delta;
  update.numel = entry.numel;
  update.index = static_cast<uint32_t>(entry.index);
  update.dtype = entry.dtype;
  update.grad_dtype = entry.grad_dtype;
  const bool in_double = entry.dtype == Dtype::kFloat64;
  device.launch(
      in_double ? strided_update_kernel<double> : strided_update_kernel<float>, chunks_of(entry), kThreads, update
  );
}

// Updates the entries [first, last), of which no two share memory.
template <typename Device>
void update_together(const Device& device, EntryIterator first, EntryIterator last, const UpdateOptions& options) {
  update_dense<float>(device, first, last, Dtype::kFloat32, options);
  update_dense<__nv_bfloat16>(device, first, last, Dtype::kBFloat16, options);
  update_dense<__half>(device, first, last, Dtype::kFloat16, options);
  update_dense<double>(device, first, last, Dtype::kFloat64, options);
  for (; first != last; ++first) {
    if (first->layout != nullptr) {
      update_strided(device, *first, options);
    }
  }
}

// adadelta_ and adadelta_.unclipped in schemas.h, whose arguments are the first of the former's.
template <typename Device>
void adadelta_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  const UpdateArguments arguments(stack, argument_count, Device::type());
  const Entries& lists = arguments.entries();
  const auto first = lists.entries.begin(), last = lists.entries.end();
  if (first == last) {
    return;
  }
  const Device device(lists.device_index);
  if (lists.disjoint) {
    update_together(device, first, last, arguments.options());
  } else {
    for (auto entry = first; entry != last; ++entry) {
      update_together(device, entry, entry + 1, arguments.options());
    }
  }
}

// check_lists in schemas.h: what adadelta_ checks, and nothing more.
template <typename Device>
void check_lists(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[0]), grads(stack[1]), square_avgs(stack[2]), acc_deltas(stack[3]);
  read_entries(params, grads, square_avgs, acc_deltas, Device::type());
}

}  // namespace torch_adadelta::cuda
