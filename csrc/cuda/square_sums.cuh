// The sums of squares behind the norms on the GPU, over the tree of square_sums.h: kernels, and below them what
// launches them. `Device` as in update.cuh.
#pragma once

#include "../options.h"
#include "../square_sums.h"
#include "tables.h"

#include <limits>

namespace torch_adadelta::cuda {

// What the gradients of one call have in common.
struct SquareOptions {
  double clipvalue;         // or infinity
  const float* grad_scale;  // nullptr without
  double loss_scale_factor;
};

// A chunk is a unit.
template <int capacity>
struct SquareTable {
  SquareOptions options;
  Chunks<capacity> units;
  const char* grad[capacity];
  double* sums[capacity];   // of the units; or of the gradient, if it is a single unit
  int64_t numel[capacity];  // of real or complex numbers
  Dtype dtype[capacity];
  bool is_complex[capacity];
  bool in_double[capacity];
};

// One gradient that is read in another order than that of its memory.
struct StridedSquares {
  SquareOptions options;
  Strides<1> strides;  // of real numbers
  const char* grad;
  double* sums;
  int64_t numel;
  Dtype dtype;
  bool is_complex;
};

// Gradients of more than one unit.
template <int capacity>
struct UnitTable {
  int count = 0;
  double* units[capacity];  // which are overwritten
  int64_t unit_count[capacity];
  double* sum[capacity];
};

static_assert(sizeof(SquareTable<kLargeTable>) <= kParameterBytes && sizeof(UnitTable<kLargeTable>) <= kParameterBytes);

// ---- Kernels --------------------------------------------------------------------------------------------------------

// A warp sums a chunk, a thread four neighbouring lanes of it, and a block the chunks of a unit.
constexpr int kThreadLanes = kSumLanes / kWarp;
static_assert(kThreads == kUnitChunks * kWarp);

// The number or pair at g, unscaled, clamped and squared.
template <int width, typename T>
__device__ __forceinline__ double square_of(T (&g)[width], T limit, const SquareOptions& options) {
  if (options.grad_scale != nullptr) {
#pragma unroll
    for (int part = 0; part < width; ++part) {
      g[part] = g[part] / static_cast<T>(*options.grad_scale);
    }
  }
  if (options.loss_scale_factor != 1) {
#pragma unroll
    for (int part = 0; part < width; ++part) {
      g[part] = g[part] / static_cast<T>(options.loss_scale_factor);
    }
  }
  return square<width, true>(g, limit);
}

// Adds the rows of a chunk of `count` elements to the lanes of a thread.
template <int width, typename T, typename Item>
__device__ __forceinline__ void add_rows(
    double (&lanes)[kThreadLanes], const Item* chunk, int count, T limit, const SquareOptions& options
) {
  constexpr int kItems = kThreadLanes * width;
  // Rows that are asked for at a time: 64 bytes a thread.
  constexpr int kAhead = 64 / (kItems * sizeof(Item));
  const int first = kThreadLanes * (threadIdx.x % kWarp);
  int row = 0;
  if (is_aligned(chunk)) {
#pragma unroll kAhead
    for (; row < count / kSumLanes; ++row) {
      const auto vector = load_vector<kItems>(chunk + width * (row * kSumLanes + first));
#pragma unroll
      for (int k = 0; k < kThreadLanes; ++k) {
        T g[width];
#pragma unroll
        for (int part = 0; part < width; ++part) {
          g[part] = widen<T>(vector.items[width * k + part]);
        }
        lanes[k] += square_of(g, limit, options);
      }
    }
  }
  for (int at = row * kSumLanes + first; at < count; at += kSumLanes) {
#pragma unroll
    for (int k = 0; k < kThreadLanes; ++k) {
      if (at + k < count) {
        T g[width];
#pragma unroll
        for (int part = 0; part < width; ++part) {
          g[part] = widen<T>(chunk[width * (at + k) + part]);
        }
        lanes[k] += square_of(g, limit, options);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void add_chunk(
    double (&lanes)[kThreadLanes],
    const char* grad,
    Dtype dtype,
    bool is_complex,
    int64_t begin,
    int count,
    const SquareOptions& options
) {
  const T limit = static_cast<T>(options.clipvalue);
  with_items(grad, dtype, [&](const auto* items) {
    if (is_complex) {
      add_rows<2>(lanes, items + 2 * begin, count, limit, options);
    } else {
      add_rows<1>(lanes, items + begin, count, limit, options);
    }
  });
}

template <int width, typename T>
__device__ __forceinline__ void add_strided_chunk(
    double (&lanes)[kThreadLanes], const StridedSquares& squares, int64_t begin, int count
) {
  const T limit = static_cast<T>(squares.options.clipvalue);
  for (int at = kThreadLanes * (threadIdx.x % kWarp); at < count; at += kSumLanes) {
#pragma unroll
    for (int k = 0; k < kThreadLanes; ++k) {
      if (at + k < count) {
        T g[width];
#pragma unroll
        for (int part = 0; part < width; ++part) {
          int64_t offset[1];
          find_offsets(squares.strides, width * (begin + at + k) + part, offset);
          g[part] = load_item<T>(squares.grad + offset[0], squares.dtype);
        }
        lanes[k] += square_of(g, limit, squares.options);
      }
    }
  }
}

// Adds up the lanes of each warp, and then the warps, which are the chunks of a unit. The first thread has the sum.
// Lanes and chunks that do not exist are zero, which changes no sum, for none is negative.
__device__ __forceinline__ double add_lanes_and_chunks(double (&lanes)[kThreadLanes]) {
  constexpr unsigned kAll = 0xffffffff;
  const int thread = threadIdx.x % kWarp;
  // Lane l and lane l + 64, 32, 16, 8 and 4.
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kThreadLanes; ++k) {
      lanes[k] += __shfl_down_sync(kAll, lanes[k], distance);
    }
  }
  __shared__ double chunks[kUnitChunks];
  if (thread == 0) {
    chunks[threadIdx.x / kWarp] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) {
    return 0;
  }
  double sum = thread < kUnitChunks ? chunks[thread] : 0.0;
#pragma unroll
  for (int distance = 1; distance < kUnitChunks; distance *= 2) {
    sum += __shfl_down_sync(kAll, sum, distance);
  }
  return sum;
}

// The elements of a unit that belong to the calling warp.
__device__ __forceinline__ int chunk_of(int64_t unit, int64_t numel, int64_t& begin) {
  begin = unit * kUnit + threadIdx.x / kWarp * kSumChunk;
  const int64_t left = numel - begin;
  return static_cast<int>(left < 0 ? 0 : left < kSumChunk ? left : kSumChunk);
}

template <int capacity>
__global__ void __launch_bounds__(kThreads, 2) square_sums_kernel(const SquareTable<capacity> __grid_constant__ table) {
  const int i = table.units.find(blockIdx.x);
  const int64_t unit = blockIdx.x - table.units.first_block[i];
  int64_t begin;
  const int count = chunk_of(unit, table.numel[i], begin);
  double lanes[kThreadLanes] = {};
  if (table.in_double[i]) {
    add_chunk<double>(lanes, table.grad[i], table.dtype[i], table.is_complex[i], begin, count, table.options);
  } else {
    add_chunk<float>(lanes, table.grad[i], table.dtype[i], table.is_complex[i], begin, count, table.options);
  }
  const double sum = add_lanes_and_chunks(lanes);
  if (threadIdx.x == 0) {
    table.sums[i][unit] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) strided_square_sums_kernel(
    const StridedSquares __grid_constant__ squares
) {
  int64_t begin;
  const int count = chunk_of(blockIdx.x, squares.numel, begin);
  double lanes[kThreadLanes] = {};
  if (squares.is_complex) {
    add_strided_chunk<2, T>(lanes, squares, begin, count);
  } else {
    add_strided_chunk<1, T>(lanes, squares, begin, count);
  }
  const double sum = add_lanes_and_chunks(lanes);
  if (threadIdx.x == 0) {
    squares.sums[blockIdx.x] = sum;
  }
}

// Adds up the units of a gradient, where they are: those at a distance of 1, then of 2, 4, … from each other.
template <int capacity>
__global__ void __launch_bounds__(kThreads) add_units_kernel(const UnitTable<capacity> __grid_constant__ table) {
  double* units = table.units[blockIdx.x];
  const int64_t count = table.unit_count[blockIdx.x];
  for (int64_t distance = 1; distance < count; distance *= 2) {
    for (int64_t at = threadIdx.x * 2 * distance; at + distance < count; at += kThreads * 2 * distance) {
      units[at] = units[at] + units[at + distance];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *table.sum[blockIdx.x] = units[0];
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

inline int64_t units_of(const Gradient& gradient) { return (gradient.numel + kUnit - 1) / kUnit; }

using GradientIterator = std::vector<Gradient>::const_iterator;

// Calls run(gradient, where the sums of its units go): `result`, at the gradient's index, or `scratch`.
template <typename Run>
void for_each_gradient(const Gradients& lists, double* result, double* scratch, const Run& run) {
  for (const Gradient& gradient : lists.gradients) {
    const int64_t units = units_of(gradient);
    run(gradient, units == 1 ? result + gradient.index : scratch);
    scratch += units == 1 ? 0 : units;
  }
}

// Sums the units of the gradients that are read in the order of their memory.
template <int capacity, typename Device>
void sum_packed(
    const Device& device, const Gradients& lists, const SquareOptions& options, double* result, double* scratch
) {
  SquareTable<capacity> table;
  table.options = options;
  int64_t blocks = 0;
  const auto launch = [&] { device.launch(square_sums_kernel<capacity>, blocks, kThreads, table); };
  for_each_gradient(lists, result, scratch, [&](const Gradient& gradient, double* sums) {
    if (gradient.layout != nullptr) {
      return;
    }
    int i = table.units.add(units_of(gradient), blocks);
    if (i < 0) {
      launch();
      table.units.count = 0;
      blocks = 0;
      i = table.units.add(units_of(gradient), blocks);
    }
    table.grad[i] = gradient.data;
    table.sums[i] = sums;
    table.numel[i] = gradient.numel;
    table.dtype[i] = gradient.dtype;
    table.is_complex[i] = gradient.is_complex;
    table.in_double[i] = gradient.in_double;
  });
  if (blocks > 0) {
    launch();
  }
}

template <typename Device>
void sum_strided(const Device& device, const Gradient& gradient, const SquareOptions& options, double* sums) {
  StridedSquares squares;
  squares.options = options;
  copy_layout<kGrad>(*gradient.layout, squares.strides);
  squares.grad = gradient.data;
  squares.sums = sums;
  squares.numel = gradient.numel;
  squares.dtype = gradient.dtype;
  squares.is_complex = gradient.is_complex;
  device.launch(
      gradient.in_double ? strided_square_sums_kernel<double> : strided_square_sums_kernel<float>,
      units_of(gradient),
      kThreads,
      squares
  );
}

// Adds up the units of the gradients that have more than one.
template <int capacity, typename Device>
void add_units(const Device& device, const Gradients& lists, double* result, double* scratch) {
  UnitTable<capacity> table;
  const auto launch = [&] { device.launch(add_units_kernel<capacity>, table.count, kThreads, table); };
  for_each_gradient(lists, result, scratch, [&](const Gradient& gradient, double* sums) {
    if (units_of(gradient) == 1) {
      return;
    }
    if (table.count == capacity) {
      launch();
      table.count = 0;
    }
    table.units[table.count] = sums;
    table.unit_count[table.count] = units_of(gradient);
    table.sum[table.count] = result + gradient.index;
    ++table.count;
  });
  if (table.count > 0) {
    launch();
  }
}

// grad_square_sums in schemas.h.
template <typename Device>
void grad_square_sums(StableIValue* stack, uint64_t, uint64_t) {
  static thread_local Gradients lists;
  std::optional<SquareSumArguments> arguments;
  std::optional<Device> device;
  std::optional<torch::stable::Tensor> result, scratch;
  double *sums = nullptr, *units = nullptr;
  before_writing([&] {
    arguments.emplace(ArgumentReader(stack), lists, Device::type());
    for (const Gradient& gradient : lists.gradients) {
      check_launch<kGrad, 1>(gradient.index, units_of(gradient), gradient.layout);
    }
    device.emplace(lists.device_index);
    result = arguments->new_result();
    sums = static_cast<double*>(result->mutable_data_ptr());
    int64_t scratch_size = 0;
    for_each_gradient(lists, sums, nullptr, [&](const Gradient& gradient, double*) {
      scratch_size += units_of(gradient) == 1 ? 0 : units_of(gradient);
    });
    if (scratch_size > 0) {
      scratch = arguments->new_doubles(scratch_size);
      units = static_cast<double*>(scratch->mutable_data_ptr());
    }
  });

  if (static_cast<int64_t>(lists.gradients.size()) < result->numel()) {  // the others are empty
    torch::stable::zero_(*result);
  }
  const SquareOptions options{arguments->clipvalue(), arguments->grad_scale(), arguments->loss_scale_factor()};
  const bool fits_small = lists.gradients.size() <= kSmallTable;
  fits_small ? sum_packed<kSmallTable>(*device, lists, options, sums, units)
             : sum_packed<kLargeTable>(*device, lists, options, sums, units);
  for_each_gradient(lists, sums, units, [&](const Gradient& gradient, double* unit_sums) {
    if (gradient.layout != nullptr) {
      sum_strided(*device, gradient, options, unit_sums);
    }
  });
  if (scratch.has_value()) {
    fits_small ? add_units<kSmallTable>(*device, lists, sums, units)
               : add_units<kLargeTable>(*device, lists, sums, units);
  }
  stack[0] = torch::stable::detail::from(*result);
}

}  // namespace torch_adadelta::cuda
