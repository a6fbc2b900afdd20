// The dense update on the GPU: kernels, and below them what chooses and launches them.
//
// `Device` stands for what the code needs of CUDA: device.h in the library, an emulator in the tests. No kernel is
// named beside a <<<>>>, so that a C++ compiler can read this file, too.
#pragma once

#include "../adadelta.h"
#include "../options.h"
#include "tables.h"

#include <algorithm>

namespace torch_adadelta::cuda {

// Elements that a block works on.
constexpr int64_t kChunk = 16384;

// How many tensors a parameter has: with its average, or without.
template <bool averages>
constexpr int kSlots = averages ? kTensors : kAverage;

template <bool averages>
constexpr int kSmall = averages ? kSmallAverageTable : kSmallTable;

template <bool averages>
constexpr int kLarge = averages ? kLargeAverageTable : kLargeTable;

template <int capacity, bool averages>
struct TensorTable {
  GradientOptions options;
  Chunks<capacity> chunks;
  uint32_t index[capacity];  // of the parameter in the lists
  char* data[kSlots<averages>][capacity];
  int64_t numel[capacity];
  Dtype grad_dtype[capacity];
  uint8_t segment[capacity];  // the place of its segment in the table
};

constexpr int64_t table_bytes(int capacity) { return capacity <= kSmallTable ? kSmallBytes : kParameterBytes; }

// How many segments find room beside the tensors.
template <int capacity, bool averages>
constexpr int kSegments =
    std::min<int64_t>((table_bytes(capacity) - sizeof(TensorTable<capacity, averages>)) / sizeof(Segment), 256);

template <int capacity, bool averages>
struct UpdateTable : TensorTable<capacity, averages> {
  Segment segments[kSegments<capacity, averages>];
};

template <bool averages>
constexpr bool kTablesFit =
    kSegments<kSmall<averages>, averages> >= 8 && sizeof(UpdateTable<kSmall<averages>, averages>) <= kSmallBytes &&
    kSegments<kLarge<averages>, averages> >= 32 && sizeof(UpdateTable<kLarge<averages>, averages>) <= kParameterBytes;
static_assert(kTablesFit<false> && kTablesFit<true>);

// One parameter that is not dense.
template <bool averages>
struct StridedUpdate {
  GradientOptions options;
  Segment segment;
  Strides<kSlots<averages>> strides;
  char* data[kSlots<averages>];
  int64_t numel;
  uint32_t index;
  Dtype dtype[kSlots<averages>];
};

static_assert(sizeof(StridedUpdate<true>) <= 4096);

// ---- Kernels --------------------------------------------------------------------------------------------------------

// What becomes of a gradient of parameter `index`. A kernel for plain options does without all but the sign.
template <typename T, bool plain>
struct GradientPipeline {
  bool negates;

  __device__ __forceinline__ GradientPipeline(const GradientOptions&, uint32_t, bool maximize) : negates(maximize) {}

  __device__ __forceinline__ T operator()(T g) const { return negates ? -g : g; }
};

template <typename T>
struct GradientPipeline<T, false> {
  GradientClip<T> clip;

  __device__ __forceinline__ GradientPipeline(const GradientOptions& options, uint32_t index, bool maximize)
      : clip(clip_of<T>(options, index, value_of(options.factor), maximize)) {}

  // clip(g), but no division by 1.
  __device__ __forceinline__ T operator()(T g) const {
    if (clip.scale != T(1)) {
      g = clip.unscaled(g);
    }
    if (clip.loss_scale != T(1)) {
      g = clip.loss_unscaled(g);
    }
    return clip.div != T(1) ? clip.divided(g) : clip.undivided(g);
  }
};

template <typename T>
__device__ __forceinline__ Hyperparameters<T> hyperparameters(const Segment& segment) {
  double values[kHyperparameters];
#pragma unroll
  for (int k = 0; k < kHyperparameters; ++k) {
    values[k] = value_of(segment[k]);
  }
  return Hyperparameters<T>(values);
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

// What a block needs to move the averages of its elements on; in shared memory, for the update leaves no registers.
template <typename T>
struct AverageUpdate {
  T* data;
  T momentum;
  T one_minus_momentum;
  bool overwrites;
};

// `count` neighbours, from index `at` on. The gradient may be the parameter: all is read before anything is written.
template <int count, bool averages = false, typename Item, typename Gradient, typename Pipeline, typename T>
__device__ __forceinline__ void update_vector(
    Item* param,
    const Gradient& gradient,
    Item* square_avg,
    Item* acc_delta,
    const AverageUpdate<T>* average,
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
  if constexpr (averages) {
    asm volatile("" ::: "memory");  // none of what follows is to be in registers before
    const T momentum = average->momentum, one_minus_momentum = average->one_minus_momentum;
    auto own = load_vector<count>(average->data + at);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      average_element(own.items[k], widen<T>(params.items[k]), momentum, one_minus_momentum);
      if (average->overwrites) {
        params.items[k] = narrow<Item>(own.items[k]);
      }
    }
    store_vector(average->data + at, own);
  }
  store_vector(param + at, params);
}

// The first `count` elements: vectors first, if all tensors are aligned, and then one by one.
template <bool averages, typename Item, typename Gradient, typename Pipeline, typename T>
__device__ __forceinline__ void update_chunk(
    Item* param,
    const Gradient& gradient,
    Item* square_avg,
    Item* acc_delta,
    const AverageUpdate<T>* average,
    int count,
    const Pipeline& pipeline,
    const Hyperparameters<T>& h
) {
  constexpr int kVector = kVectorBytes / sizeof(Item);
  int begin = 0;
  const bool is_average_aligned = !averages || is_aligned(average->data);
  if (is_aligned(param) && is_aligned(gradient.grad) && is_aligned(square_avg) && is_aligned(acc_delta) &&
      is_average_aligned) {
    const int vectors_end = count - count % kVector;
    for (int at = threadIdx.x * kVector; at < vectors_end; at += kThreads * kVector) {
      update_vector<kVector, averages>(param, gradient, square_avg, acc_delta, average, at, pipeline, h);
    }
    begin = vectors_end;
  }
  for (int at = begin + threadIdx.x; at < count; at += kThreads) {
    update_vector<1, averages>(param, gradient, square_avg, acc_delta, average, at, pipeline, h);
  }
}

template <typename Item, bool plain, bool averages, int capacity>
__global__ void __launch_bounds__(kThreads, sizeof(Item) == 8 ? 1 : 2) update_kernel(
    const UpdateTable<capacity, averages> __grid_constant__ table
) {
  using T = OpmathType<Item>;
  if (is_skipped(table.options)) {
    return;
  }
  const int i = table.chunks.find(blockIdx.x);
  const int64_t begin = (blockIdx.x - table.chunks.first_block[i]) * kChunk;
  const int64_t left = table.numel[i] - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  const Segment& segment = table.segments[table.segment[i]];
  const GradientPipeline<T, plain> pipeline(table.options, table.index[i], segment.maximize());
  const auto h = hyperparameters<T>(segment);

  auto* param = reinterpret_cast<Item*>(table.data[kParam][i]) + begin;
  auto* square_avg = reinterpret_cast<Item*>(table.data[kSquareAvg][i]) + begin;
  auto* acc_delta = reinterpret_cast<Item*>(table.data[kAccDelta][i]) + begin;
  __shared__ AverageUpdate<T> average;
  if constexpr (averages) {
    if (threadIdx.x == 0) {
      T* data = reinterpret_cast<T*>(table.data[kAverage][i]) + begin;
      average = {data, h.ema_momentum, h.one_minus_ema_momentum, h.overwrites};
    }
    __syncthreads();
  }
  constexpr Dtype dtype = std::is_same_v<Item, float>    ? Dtype::kFloat32
                          : std::is_same_v<Item, double> ? Dtype::kFloat64
                          : std::is_same_v<Item, __half> ? Dtype::kFloat16
                                                         : Dtype::kBFloat16;
  const Dtype grad_dtype = table.grad_dtype[i];
  const char* grad = table.data[kGrad][i] + begin * item_size(grad_dtype);
  if (grad_dtype == dtype) {
    const SameDtype<Item> gradient{reinterpret_cast<const Item*>(grad)};
    update_chunk<averages>(param, gradient, square_avg, acc_delta, &average, count, pipeline, h);
  } else {
    const AnyDtype gradient{grad, grad_dtype};
    update_chunk<averages>(param, gradient, square_avg, acc_delta, &average, count, pipeline, h);
  }
}

// One element, whose parameter and state, of one dtype, and average, if it has one, lie at these offsets.
template <int tensors, typename T>
__device__ __forceinline__ void update_item(
    T g, char* const (&data)[tensors], const int64_t (&offsets)[tensors], Dtype dtype, const Hyperparameters<T>& h
) {
  char* param = data[kParam] + offsets[kParam];
  char* square_avg = data[kSquareAvg] + offsets[kSquareAvg];
  char* acc_delta = data[kAccDelta] + offsets[kAccDelta];
  T a = load_item<T>(square_avg, dtype);
  T u = load_item<T>(acc_delta, dtype);
  T p = load_item<T>(param, dtype);
  adadelta_element(g, a, u, p, h);
  store_item(square_avg, dtype, a);
  store_item(acc_delta, dtype, u);
  store_item(param, dtype, p);
  if constexpr (tensors > kAverage) {
    T& average = *reinterpret_cast<T*>(data[kAverage] + offsets[kAverage]);
    average_element(average, load_item<T>(param, dtype), h.ema_momentum, h.one_minus_ema_momentum);
    if (h.overwrites) {
      store_item(param, dtype, average);
    }
  }
}

template <typename T, bool averages>
__global__ void __launch_bounds__(kThreads) strided_update_kernel(
    const StridedUpdate<averages> __grid_constant__ update
) {
  if (is_skipped(update.options)) {
    return;
  }
  const auto h = hyperparameters<T>(update.segment);
  const GradientPipeline<T, false> pipeline(update.options, update.index, update.segment.maximize());
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t end = begin + kChunk < update.numel ? begin + kChunk : update.numel;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    int64_t offsets[kSlots<averages>];
    find_offsets(update.strides, at, offsets);
    const T g = pipeline(load_item<T>(update.data[kGrad] + offsets[kGrad], update.dtype[kGrad]));
    update_item(g, update.data, offsets, update.dtype[kParam], h);
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

inline int64_t chunks_of(const Entry& entry) { return (entry.numel + kChunk - 1) / kChunk; }

using EntryIterator = std::vector<Entry>::const_iterator;

// Updates the dense entries of one dtype among [first, last) until the table is full, and returns where to go on.
template <typename Item, bool plain, bool averages, int capacity, typename Device>
EntryIterator update_table(
    const Device& device, EntryIterator first, EntryIterator last, Dtype dtype, const UpdateOptions& options
) {
  UpdateTable<capacity, averages> table;
  table.options = options.gradient;
  int64_t blocks = 0;
  int segments = 0;
  uint32_t segment = 0;  // the last of them, if there is one
  for (; first != last; ++first) {
    if (first->layout != nullptr || first->dtype[kParam] != dtype) {
      continue;
    }
    const bool is_new = segments == 0 || first->segment != segment;
    if (is_new && segments == kSegments<capacity, averages>) {
      break;
    }
    const int i = table.chunks.add(chunks_of(*first), blocks);
    if (i < 0) {
      break;
    }
    if (is_new) {
      segment = first->segment;
      table.segments[segments++] = options.segments[segment];
    }
    table.segment[i] = static_cast<uint8_t>(segments - 1);
    table.index[i] = static_cast<uint32_t>(first->index);
    for (int slot = 0; slot < kSlots<averages>; ++slot) {
      table.data[slot][i] = first->data[slot];
    }
    table.numel[i] = first->numel;
    table.grad_dtype[i] = first->dtype[kGrad];
  }
  device.launch(update_kernel<Item, plain, averages, capacity>, blocks, kThreads, table);
  return first;
}

// Updates the dense entries of one dtype among [first, last).
template <typename Item, bool averages, typename Device>
void update_dense(
    const Device& device, EntryIterator first, EntryIterator last, Dtype dtype, const UpdateOptions& options
) {
  const auto is_wanted = [&](const Entry& entry) { return entry.layout == nullptr && entry.dtype[kParam] == dtype; };
  constexpr int kMost = kSmall<averages>, kMostSegments = kSegments<kMost, averages>;
  const auto fits_small = [&] {
    int tensors = 0, segments = 0;
    uint32_t segment = 0;
    for (auto entry = first; entry != last && tensors <= kMost && segments <= kMostSegments; ++entry) {
      if (is_wanted(*entry)) {
        segments += tensors++ == 0 || entry->segment != segment;
        segment = entry->segment;
      }
    }
    return tensors <= kMost && segments <= kMostSegments;
  };
  while ((first = std::find_if(first, last, is_wanted)) != last) {
    const bool small = fits_small();
    const auto update = [&](auto plain) {
      first = small ? update_table<Item, plain, averages, kMost>(device, first, last, dtype, options)
                    : update_table<Item, plain, averages, kLarge<averages>>(device, first, last, dtype, options);
    };
    // With averages there is no kernel for plain options: memory takes longer than they do.
    if (!averages && options.gradient.is_plain()) {
      update(std::bool_constant<!averages>());
    } else {
      update(std::false_type());
    }
  }
}

template <bool averages, typename Device>
void update_strided(const Device& device, const Entry& entry, const UpdateOptions& options) {
  constexpr int slots = kSlots<averages>;
  StridedUpdate<averages> update;
  update.options = options.gradient;
  update.segment = options.segments[entry.segment];
  copy_layout<0>(*entry.layout, update.strides);
  std::copy_n(entry.data, slots, update.data);
  std::copy_n(entry.dtype, slots, update.dtype);
  update.numel = entry.numel;
  update.index = static_cast<uint32_t>(entry.index);
  const bool in_double = entry.dtype[kParam] == Dtype::kFloat64;
  device.launch(
      in_double ? strided_update_kernel<double, averages> : strided_update_kernel<float, averages>,
      chunks_of(entry),
      kThreads,
      update
  );
}

// Updates the entries [first, last), of which no two share memory.
template <bool averages, typename Device>
void update_all(const Device& device, EntryIterator first, EntryIterator last, const UpdateOptions& options) {
  update_dense<float, averages>(device, first, last, Dtype::kFloat32, options);
  update_dense<__nv_bfloat16, averages>(device, first, last, Dtype::kBFloat16, options);
  update_dense<__half, averages>(device, first, last, Dtype::kFloat16, options);
  update_dense<double, averages>(device, first, last, Dtype::kFloat64, options);
  for (; first != last; ++first) {
    if (first->layout != nullptr) {
      update_strided<averages>(device, *first, options);
    }
  }
}

// The same. All of them have averages, or none has.
template <typename Device>
void update_together(const Device& device, EntryIterator first, EntryIterator last, const UpdateOptions& options) {
  if (first != last && first->data[kAverage] != nullptr) {
    update_all<true>(device, first, last, options);
  } else {
    update_all<false>(device, first, last, options);
  }
}

// adadelta_ in schemas.h.
template <typename Device>
void adadelta_(StableIValue* stack, uint64_t, uint64_t) {
  static thread_local Workspace workspace;
  std::optional<UpdateArguments> arguments;
  std::optional<Device> device;
  before_writing([&] {
    arguments.emplace(ArgumentReader(stack), workspace, Device::type());
    for (const Entry& entry : workspace.entries) {
      check_launch<0, kTensors>(entry.index, chunks_of(entry), entry.layout);
    }
    device.emplace(workspace.device_index);
  });
  const auto first = workspace.entries.begin(), last = workspace.entries.end();
  if (arguments->check_only()) {
    return;
  }
  if (workspace.disjoint) {
    update_together(*device, first, last, arguments->options());
  } else {
    for (auto entry = first; entry != last; ++entry) {
      update_together(*device, entry, entry + 1, arguments->options());
    }
  }
}

}  // namespace torch_adadelta::cuda
