// How the kernels read and write memory: conversions to and from the opmath dtype T, vectors of 16 bytes, layouts.
#pragma once

#include "../dtypes.h"
#include "../masters.h"
#include "../options.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace torch_adadelta::cuda {

constexpr int kThreads = 512;
constexpr int kWarp = 32;

// ---- Conversions ----------------------------------------------------------------------------------------------------

// What the arithmetic on parameters of a dtype runs in.
template <typename Item>
using OpmathType = std::conditional_t<std::is_same_v<Item, double>, double, float>;

template <typename T>
__device__ __forceinline__ T widen(float item) {
  return static_cast<T>(item);
}

template <typename T>
__device__ __forceinline__ T widen(double item) {
  return static_cast<T>(item);
}

template <typename T>
__device__ __forceinline__ T widen(__half item) {
  return static_cast<T>(__half2float(item));
}

template <typename T>
__device__ __forceinline__ T widen(__nv_bfloat16 item) {
  return static_cast<T>(__bfloat162float(item));
}

// Rounds to nearest, ties to even.
template <typename Item, typename T>
__device__ __forceinline__ Item narrow(T value) {
  if constexpr (std::is_same_v<Item, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<Item, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <typename Item>
constexpr Dtype kDtypeOfItem = std::is_same_v<Item, float>    ? Dtype::kFloat32
                               : std::is_same_v<Item, double> ? Dtype::kFloat64
                               : std::is_same_v<Item, __half> ? Dtype::kFloat16
                                                              : Dtype::kBFloat16;

__device__ __forceinline__ float load_master(uint16_t param, uint16_t remainder) {
  return __uint_as_float(join_master(param, remainder));
}

// Returns run(pointer to items of the dtype).
template <typename Run>
__device__ __forceinline__ auto with_items(const char* data, Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat64:
      return run(reinterpret_cast<const double*>(data));
    case Dtype::kFloat16:
      return run(reinterpret_cast<const __half*>(data));
    case Dtype::kBFloat16:
      return run(reinterpret_cast<const __nv_bfloat16*>(data));
    default:
      return run(reinterpret_cast<const float*>(data));
  }
}

template <typename T>
__device__ __forceinline__ T load_item(const char* data, Dtype dtype) {
  return with_items(data, dtype, [](const auto* items) { return widen<T>(*items); });
}

template <typename T>
__device__ __forceinline__ void store_item(char* data, Dtype dtype, T value) {
  if constexpr (std::is_same_v<T, double>) {
    *reinterpret_cast<double*>(data) = value;
  } else if (dtype == Dtype::kFloat16) {
    *reinterpret_cast<__half*>(data) = narrow<__half>(value);
  } else if (dtype == Dtype::kBFloat16) {
    *reinterpret_cast<__nv_bfloat16*>(data) = narrow<__nv_bfloat16>(value);
  } else {
    *reinterpret_cast<float*>(data) = value;
  }
}

__device__ __forceinline__ double value_of(const Scalar& scalar) {
  return scalar.is_tensor ? load_item<double>(static_cast<const char*>(scalar.data), scalar.dtype) : scalar.number;
}

// ---- Vectors --------------------------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;

// Items that are read or written by as few instructions as memory allows.
template <typename Item, int count>
struct alignas(count * sizeof(Item) < kVectorBytes ? count * sizeof(Item) : kVectorBytes) Vector {
  Item items[count];
};

template <int count, typename Item>
__device__ __forceinline__ Vector<Item, count> load_vector(const Item* from) {
  return *reinterpret_cast<const Vector<Item, count>*>(from);
}

template <typename Item, int count>
__device__ __forceinline__ void store_vector(Item* to, const Vector<Item, count>& vector) {
  *reinterpret_cast<Vector<Item, count>*>(to) = vector;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// `count` neighbours of a tensor, as memory has them.
template <typename Item, int count>
struct PlainGroup {
  Vector<Item, count> items;

  template <typename T>
  __device__ __forceinline__ T get(int k) const {
    return widen<T>(items.items[k]);
  }

  template <typename T>
  __device__ __forceinline__ void set(int k, T value) {
    items.items[k] = narrow<Item>(value);
  }
};

// A tensor, as kernels read and write it.
template <typename ItemType>
struct Plain {
  using Item = ItemType;
  static constexpr bool kIsMaster = false;

  Item* items;

  __device__ __forceinline__ Plain(char* data, char*, int64_t begin) : items(reinterpret_cast<Item*>(data) + begin) {}

  __device__ __forceinline__ bool is_aligned() const { return cuda::is_aligned(items); }

  template <int count>
  __device__ __forceinline__ PlainGroup<Item, count> load(int64_t at) const {
    return {load_vector<count>(items + at)};
  }

  template <int count>
  __device__ __forceinline__ void store(int64_t at, const PlainGroup<Item, count>& group) const {
    store_vector(items + at, group.items);
  }
};

template <int count>
struct MasterGroup {
  Vector<uint16_t, count> params, remainders;

  template <typename T>
  __device__ __forceinline__ T get(int k) const {
    return load_master(params.items[k], remainders.items[k]);
  }

  __device__ __forceinline__ void set(int k, float value) {
    const SplitMaster halves = split_master(__float_as_uint(value));
    params.items[k] = halves.param;
    remainders.items[k] = halves.remainder;
  }
};

// A bfloat16 parameter and its remainder, which stand for its master.
struct Master {
  using Item = __nv_bfloat16;  // of the gradient
  static constexpr bool kIsMaster = true;

  uint16_t* params;
  uint16_t* remainders;

  __device__ __forceinline__ Master(char* data, char* remainder, int64_t begin)
      : params(reinterpret_cast<uint16_t*>(data) + begin), remainders(reinterpret_cast<uint16_t*>(remainder) + begin) {}

  __device__ __forceinline__ bool is_aligned() const {
    return cuda::is_aligned(params) && cuda::is_aligned(remainders);
  }

  template <int count>
  __device__ __forceinline__ MasterGroup<count> load(int64_t at) const {
    return {load_vector<count>(params + at), load_vector<count>(remainders + at)};
  }

  template <int count>
  __device__ __forceinline__ void store(int64_t at, const MasterGroup<count>& group) const {
    store_vector(params + at, group.params);
    store_vector(remainders + at, group.remainders);
  }
};

// ---- Layouts --------------------------------------------------------------------------------------------------------

// PyTorch's limit, and more than a tensor can have of dimensions with at least two elements.
constexpr int kMaxDimensions = 64;

// The dimensions of a tensor that is not dense, with the strides in bytes of it and the tensors beside it, outermost
// first.
template <int tensors>
struct Strides {
  int dimensions;
  int64_t size[kMaxDimensions];
  int64_t stride[kMaxDimensions][tensors];
};

// Where the element `index`, counted in memory order, lies in each tensor.
template <int tensors>
__device__ __forceinline__ void find_offsets(
    const Strides<tensors>& strides, int64_t index, int64_t (&offsets)[tensors]
) {
#pragma unroll
  for (int k = 0; k < tensors; ++k) {
    offsets[k] = 0;
  }
  for (int d = strides.dimensions - 1; d >= 0; --d) {
    const int64_t size = strides.size[d];
    int64_t quotient;
    if ((index | size) >> 32 == 0) {  // many times faster
      quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
    } else {
      quotient = index / size;
    }
    const int64_t remainder = index - quotient * size;
#pragma unroll
    for (int k = 0; k < tensors; ++k) {
      offsets[k] += remainder * strides.stride[d][k];
    }
    index = quotient;
  }
}

}  // namespace torch_adadelta::cuda
