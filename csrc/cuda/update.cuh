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

// Which of the optional tensors each parameter of a launch has.
template <bool averages, bool remainders>
struct Optionals {
  static constexpr bool kAverages = averages;
  static constexpr int kCount = averages + remainders;
  static constexpr int kSlots = kFirstOptional + kCount;
  static constexpr int kSmall = kSmallTables[kCount];
  static constexpr int kLarge = kLargeTables[kCount];

  // The slot of a place in the table, and the last place, in which the remainder stands.
  static constexpr int slot(int place) {
    return place < kFirstOptional || (averages && place == kAverage) ? place : static_cast<int>(kRemainder);
  }
  static constexpr int kLast = kSlots - 1;
};

template <int capacity, typename Own>
struct TensorTable {
  GradientOptions options;
  Chunks<capacity> chunks;
  uint32_t index[capacity];  // of the parameter in the lists
  char* data[Own::kSlots][capacity];
  int64_t numel[capacity];
  Dtype grad_dtype[capacity];
  uint8_t segment[capacity];  // the place of its segment in the table
};

constexpr int64_t table_bytes(int capacity) { return capacity <= kSmallTable ? kSmallBytes : kParameterBytes; }

// How many segments find room beside the tensors.
template <int capacity, typename Own>
constexpr int kSegments =
    std::min<int64_t>((table_bytes(capacity) - sizeof(TensorTable<capacity, Own>)) / sizeof(Segment), 256);

template <int capacity, typename Own>
struct UpdateTable : TensorTable<capacity, Own> {
  Segment segments[kSegments<capacity, Own>];
};

template <typename Own>
constexpr bool kTablesFit =
    kSegments<Own::kSmall, Own> >= 8 && sizeof(UpdateTable<Own::kSmall, Own>) <= kSmallBytes &&
    kSegments<Own::kLarge, Own> >= 32 && sizeof(UpdateTable<Own::kLarge, Own>) <= kParameterBytes;
static_assert(kTablesFit<Optionals<false, false>> && kTablesFit<Optionals<true, false>>);
static_assert(kTablesFit<Optionals<false, true>> && kTablesFit<Optionals<true, true>>);

// One parameter that is not dense.
struct StridedUpdate {
  GradientOptions options;
  Segment segment;
  Strides<kTensors> strides;
  char* data[kTensors];
  int64_t numel;
  uint32_t index;
  Dtype dtype[kTensors];
};

static_assert(sizeof(StridedUpdate) <= 4096);

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

// What a block needs to move the averages of its elements on; in shared memory, as then the pipeline of the gradients
// is, for the update leaves no registers.
template <typename T>
struct AverageUpdate {
  T* data;
  T momentum;
  T one_minus_momentum;
  bool overwrites;
};

// `count` neighbours, from index `at` on. The gradient may be the parameter: all is read before anything is written.
template <
    int count,
    bool averages = false,
    typename Param,
    typename Gradient,
    typename State,
    typename Pipeline,
    typename T>
__device__ __forceinline__ void update_vector(
    const Param& param,
    const Gradient& gradient,
    const State& square_avg,
    const State& acc_delta,
    const AverageUpdate<T>* average,
    int64_t at,
    const Pipeline& pipeline,
    const Hyperparameters<T>& h
) {
  T g[count];
  gradient.load(at, g);
  if constexpr (averages) {  // now, so that the registers that the pipeline takes are free for what follows
#pragma unroll
    for (int k = 0; k < count; ++k) {
      g[k] = pipeline(g[k]);
    }
  }
  auto square_avgs = square_avg.template load<count>(at);
  auto acc_deltas = acc_delta.template load<count>(at);
  auto params = param.template load<count>(at);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    T a = square_avgs.template get<T>(k);
    T u = acc_deltas.template get<T>(k);
    T p = params.template get<T>(k);
    adadelta_element(averages ? g[k] : pipeline(g[k]), a, u, p, h);
    square_avgs.set(k, a);
    acc_deltas.set(k, u);
    params.set(k, p);
  }
  square_avg.store(at, square_avgs);
  acc_delta.store(at, acc_deltas);
  if constexpr (averages) {
    asm volatile("" ::: "memory");  // none of what follows is to be in registers before
    const T momentum = average->momentum, one_minus_momentum = average->one_minus_momentum;
    auto own = load_vector<count>(average->data + at);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      average_element(own.items[k], params.template get<T>(k), momentum, one_minus_momentum);
    }
    if (average->overwrites) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        params.set(k, own.items[k]);
      }
    }
    store_vector(average->data + at, own);
  }
  param.store(at, params);
}

// The first `count` elements: vectors first, if all tensors are aligned, and then one by one.
template <bool averages, typename Param, typename Gradient, typename State, typename Pipeline, typename T>
__device__ __forceinline__ void update_chunk(
    const Param& param,
    const Gradient& gradient,
    const State& square_avg,
    const State& acc_delta,
    const AverageUpdate<T>* average,
    int count,
    const Pipeline& pipeline,
    const Hyperparameters<T>& h
) {
  constexpr size_t kItem = sizeof(typename Param::Item), kStateItem = sizeof(typename State::Item);
  constexpr int kVector = kVectorBytes / (kItem > kStateItem ? kItem : kStateItem);
  int begin = 0;
  const bool is_average_aligned = !averages || is_aligned(average->data);
  if (param.is_aligned() && is_aligned(gradient.grad) && square_avg.is_aligned() && acc_delta.is_aligned() &&
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

template <typename StateItem, typename Param, bool plain, typename Own, int capacity>
__global__ void __launch_bounds__(kThreads, sizeof(StateItem) == 8 ? 1 : 2) update_kernel(
    const UpdateTable<capacity, Own> __grid_constant__ table
) {
  using Item = typename Param::Item;
  using T = OpmathType<Item>;
  using State = Plain<StateItem>;
  if (is_skipped(table.options)) {
    return;
  }
  const int i = table.chunks.find(blockIdx.x);
  const int64_t begin = (blockIdx.x - table.chunks.first_block[i]) * kChunk;
  const int64_t left = table.numel[i] - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  const Segment& segment = table.segments[table.segment[i]];
  using Pipeline = GradientPipeline<T, plain>;
  const Pipeline pipeline(table.options, table.index[i], segment.maximize());
  const auto h = hyperparameters<T>(segment);

  const Param param(table.data[kParam][i], table.data[Own::kLast][i], begin);
  const State square_avg(table.data[kSquareAvg][i], nullptr, begin);
  const State acc_delta(table.data[kAccDelta][i], nullptr, begin);
  __shared__ AverageUpdate<T> average;
  alignas(Pipeline) __shared__ char shared_pipeline[sizeof(Pipeline)];
  const Pipeline* used = &pipeline;
  if constexpr (Own::kAverages) {
    if (threadIdx.x == 0) {
      T* data = reinterpret_cast<T*>(table.data[kAverage][i]) + begin;
      average = {data, h.ema_momentum, h.one_minus_ema_momentum, h.overwrites};
      *reinterpret_cast<Pipeline*>(shared_pipeline) = pipeline;
    }
    __syncthreads();
    used = reinterpret_cast<const Pipeline*>(shared_pipeline);
  }
  const Dtype grad_dtype = table.grad_dtype[i];
  const char* grad = table.data[kGrad][i] + begin * item_size(grad_dtype);
  if (grad_dtype == kDtypeOfItem<Item>) {
    const SameDtype<Item> gradient{reinterpret_cast<const Item*>(grad)};
    update_chunk<Own::kAverages>(param, gradient, square_avg, acc_delta, &average, count, *used, h);
  } else {
    const AnyDtype gradient{grad, grad_dtype};
    update_chunk<Own::kAverages>(param, gradient, square_avg, acc_delta, &average, count, *used, h);
  }
}

// The parameter, or its master if it has a remainder, whose elements lie at these offsets.
template <typename T>
__device__ __forceinline__ T
load_param(char* const (&data)[kTensors], const int64_t (&offsets)[kTensors], const Dtype (&dtypes)[kTensors]) {
  const char* param = data[kParam] + offsets[kParam];
  if (data[kRemainder] == nullptr) {
    return load_item<T>(param, dtypes[kParam]);
  }
  const char* remainder = data[kRemainder] + offsets[kRemainder];
  return load_master(*reinterpret_cast<const uint16_t*>(param), *reinterpret_cast<const uint16_t*>(remainder));
}

template <typename T>
__device__ __forceinline__ void store_param(
    char* const (&data)[kTensors], const int64_t (&offsets)[kTensors], const Dtype (&dtypes)[kTensors], T value
) {
  char* param = data[kParam] + offsets[kParam];
  if (data[kRemainder] == nullptr) {
    return store_item(param, dtypes[kParam], value);
  }
  const SplitMaster halves = split_master(__float_as_uint(static_cast<float>(value)));
  *reinterpret_cast<uint16_t*>(param) = halves.param;
  *reinterpret_cast<uint16_t*>(data[kRemainder] + offsets[kRemainder]) = halves.remainder;
}

// One element, whose tensors, those that there are, have it at these offsets.
template <typename T>
__device__ __forceinline__ void update_item(
    T g,
    char* const (&data)[kTensors],
    const int64_t (&offsets)[kTensors],
    const Dtype (&dtypes)[kTensors],
    const Hyperparameters<T>& h
) {
  char* square_avg = data[kSquareAvg] + offsets[kSquareAvg];
  char* acc_delta = data[kAccDelta] + offsets[kAccDelta];
  T a = load_item<T>(square_avg, dtypes[kSquareAvg]);
  T u = load_item<T>(acc_delta, dtypes[kAccDelta]);
  T p = load_param<T>(data, offsets, dtypes);
  adadelta_element(g, a, u, p, h);
  store_item(square_avg, dtypes[kSquareAvg], a);
  store_item(acc_delta, dtypes[kAccDelta], u);
  store_param(data, offsets, dtypes, p);
  if (data[kAverage] != nullptr) {
    T& average = *reinterpret_cast<T*>(data[kAverage] + offsets[kAverage]);
    average_element(average, load_param<T>(data, offsets, dtypes), h.ema_momentum, h.one_minus_ema_momentum);
    if (h.overwrites) {
      store_param(data, offsets, dtypes, average);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) strided_update_kernel(
    const StridedUpdate __grid_constant__ update
) {
  if (is_skipped(update.options)) {
    return;
  }
  const auto h = hyperparameters<T>(update.segment);
  const GradientPipeline<T, false> pipeline(update.options, update.index, update.segment.maximize());
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t end = begin + kChunk < update.numel ? begin + kChunk : update.numel;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    int64_t offsets[kTensors];
    find_offsets(update.strides, at, offsets);
    const T g = pipeline(load_item<T>(update.data[kGrad] + offsets[kGrad], update.dtype[kGrad]));
    update_item(g, update.data, offsets, update.dtype, h);
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

inline int64_t chunks_of(const Entry& entry) { return (entry.numel + kChunk - 1) / kChunk; }

using EntryIterator = std::vector<Entry>::const_iterator;

// How memory holds a parameter and its state.
template <typename ParamType, typename StateItemType>
struct Format {
  using Param = ParamType;
  using StateItem = StateItemType;

  template <typename Entry>
  static bool is_of(const Entry& entry) {
    return entry.dtype[kParam] == kDtypeOfItem<typename Param::Item> &&
           entry.dtype[kFirstState] == kDtypeOfItem<StateItem> &&
           (entry.data[kRemainder] != nullptr) == Param::kIsMaster;
  }
};

// Calls run(Format) for each of them.
template <typename Run>
void for_each_format(const Run& run) {
  using BFloat16 = __nv_bfloat16;
  run(Format<Plain<float>, float>());
  run(Format<Plain<float>, BFloat16>());
  run(Format<Plain<BFloat16>, BFloat16>());
  run(Format<Plain<BFloat16>, float>());
  run(Format<Plain<__half>, __half>());
  run(Format<Plain<__half>, float>());
  run(Format<Plain<__half>, BFloat16>());
  run(Format<Plain<double>, double>());
  run(Format<Master, float>());
  run(Format<Master, BFloat16>());
}

// Updates the dense entries of one format among [first, last) until the table is full, and returns where to go on.
template <typename Format, bool plain, typename Own, int capacity, typename Device>
EntryIterator update_table(
    const Device& device, EntryIterator first, EntryIterator last, const UpdateOptions& options
) {
  UpdateTable<capacity, Own> table;
  table.options = options.gradient;
  int64_t blocks = 0;
  int segments = 0;
  uint32_t segment = 0;  // the last of them, if there is one
  for (; first != last; ++first) {
    if (first->layout != nullptr || !Format::is_of(*first)) {
      continue;
    }
    const bool is_new = segments == 0 || first->segment != segment;
    if (is_new && segments == kSegments<capacity, Own>) {
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
    for (int place = 0; place < Own::kSlots; ++place) {
      table.data[place][i] = first->data[Own::slot(place)];
    }
    table.numel[i] = first->numel;
    table.grad_dtype[i] = first->dtype[kGrad];
  }
  using Param = typename Format::Param;
  device.launch(update_kernel<typename Format::StateItem, Param, plain, Own, capacity>, blocks, kThreads, table);
  return first;
}

// Updates the dense entries of one format among [first, last).
template <typename Format, bool averages, typename Device>
void update_dense(const Device& device, EntryIterator first, EntryIterator last, const UpdateOptions& options) {
  using Own = Optionals<averages, Format::Param::kIsMaster>;
  const auto is_wanted = [](const Entry& entry) { return entry.layout == nullptr && Format::is_of(entry); };
  const auto fits_small = [&] {
    int tensors = 0, segments = 0;
    uint32_t segment = 0;
    for (auto entry = first; entry != last && tensors <= Own::kSmall && segments <= kSegments<Own::kSmall, Own>;
         ++entry) {
      if (is_wanted(*entry)) {
        segments += tensors++ == 0 || entry->segment != segment;
        segment = entry->segment;
      }
    }
    return tensors <= Own::kSmall && segments <= kSegments<Own::kSmall, Own>;
  };
  // Only tensors of one dtype have a kernel for plain options, and not with averages: else memory takes longer than
  // they do.
  constexpr bool kHasPlain = !averages && std::is_same_v<typename Format::Param, Plain<typename Format::StateItem>>;
  while ((first = std::find_if(first, last, is_wanted)) != last) {
    const bool small = fits_small();
    const auto update = [&](auto plain) {
      first = small ? update_table<Format, plain, Own, Own::kSmall>(device, first, last, options)
                    : update_table<Format, plain, Own, Own::kLarge>(device, first, last, options);
    };
    if (kHasPlain && options.gradient.is_plain()) {
      update(std::bool_constant<kHasPlain>());
    } else {
      update(std::false_type());
    }
  }
}

template <typename Device>
void update_strided(const Device& device, const Entry& entry, const UpdateOptions& options) {
  StridedUpdate update;
  update.options = options.gradient;
  update.segment = options.segments[entry.segment];
  copy_layout<0>(*entry.layout, update.strides);
  std::copy_n(entry.data, kTensors, update.data);
  std::copy_n(entry.dtype, kTensors, update.dtype);
  update.numel = entry.numel;
  update.index = static_cast<uint32_t>(entry.index);
  const bool in_double = entry.dtype[kParam] == Dtype::kFloat64;
  device.launch(
      in_double ? strided_update_kernel<double> : strided_update_kernel<float>, chunks_of(entry), kThreads, update
  );
}

// Updates the entries [first, last), of which no two share memory. All of them have averages, or none has.
template <typename Device>
void update_together(const Device& device, EntryIterator first, EntryIterator last, const UpdateOptions& options) {
  const bool averages = first != last && first->data[kAverage] != nullptr;
  for_each_format([&](auto format) {
    using Format = decltype(format);
    averages ? update_dense<Format, true>(device, first, last, options)
             : update_dense<Format, false>(device, first, last, options);
  });
  for (; first != last; ++first) {
    if (first->layout != nullptr) {
      update_strided(device, *first, options);
    }
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
