// Blocks of elements on their way between memory, of any dtype and layout, and the opmath dtype T.
#pragma once

#include "kernels/kernel_table.h"

#include "../tensor_lists.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace torch_adadelta::cpu {

// Calls run(std::integral_constant of the slot) for the first `count` tensors of a parameter.
template <int count = kTensors, typename Run>
ADADELTA_INLINE void for_each_slot(const Run& run) {
  [&]<int... slots>(std::integer_sequence<int, slots...>) {
    (run(std::integral_constant<int, slots>()), ...);
  }(std::make_integer_sequence<int, count>());
}

// Elements that are converted or gathered at a time: five buffers of doubles (20 KiB) stay in the first-level cache.
constexpr int64_t kBlock = 512;

template <typename T>
void load_contiguous(const KernelTable& kernels, T* to, const char* from, Dtype dtype, int64_t count) {
  const auto* half = reinterpret_cast<const uint16_t*>(from);
  if constexpr (std::is_same_v<T, float>) {
    switch (dtype) {
      case Dtype::kFloat32:
        std::copy_n(reinterpret_cast<const float*>(from), count, to);
        return;
      case Dtype::kFloat64:
        return kernels.float_from_double(to, reinterpret_cast<const double*>(from), count);
      case Dtype::kFloat16:
        return kernels.float_from_half(to, half, count);
      case Dtype::kBFloat16:
        return kernels.float_from_bfloat16(to, half, count);
      default:
        return;
    }
  } else {
    float as_float[kBlock];
    switch (dtype) {
      case Dtype::kFloat64:
        std::copy_n(reinterpret_cast<const double*>(from), count, to);
        return;
      case Dtype::kFloat32:
        return kernels.double_from_float(to, reinterpret_cast<const float*>(from), count);
      case Dtype::kFloat16:
        kernels.float_from_half(as_float, half, count);
        break;
      case Dtype::kBFloat16:
        kernels.float_from_bfloat16(as_float, half, count);
        break;
      default:
        return;
    }
    kernels.double_from_float(to, as_float, count);
  }
}

template <typename T>
void store_contiguous(const KernelTable& kernels, char* to, Dtype dtype, const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == Dtype::kFloat16) {
      return kernels.half_from_float(reinterpret_cast<uint16_t*>(to), from, count);
    }
    if (dtype == Dtype::kBFloat16) {
      return kernels.bfloat16_from_float(reinterpret_cast<uint16_t*>(to), from, count);
    }
  }
  std::copy_n(from, count, reinterpret_cast<T*>(to));
}

// Collects elements that lie `stride` bytes apart, as they are; their conversion is the contiguous kernels' work.
template <typename Item>
void gather(char* to, const char* from, int64_t stride, int64_t count) {
  auto* items = reinterpret_cast<Item*>(to);
  for (int64_t i = 0; i < count; ++i) {
    items[i] = *reinterpret_cast<const Item*>(from + i * stride);
  }
}

template <typename Item>
void scatter(char* to, const char* from, int64_t stride, int64_t count) {
  const auto* items = reinterpret_cast<const Item*>(from);
  for (int64_t i = 0; i < count; ++i) {
    *reinterpret_cast<Item*>(to + i * stride) = items[i];
  }
}

// Calls run(offset in bytes, position in the block, count) for each stretch of the innermost dimension that the
// elements [begin, begin + count) of a strided tensor consist of.
template <int slot, typename Run>
void for_each_run(const Layout& layout, int64_t begin, int64_t count, const Run& run) {
  const Dimension& inner = layout.back();
  for (int64_t done = 0; done < count;) {
    int64_t index = begin + done;
    const int64_t first = index % inner.size;
    int64_t offset = first * inner.stride[slot];
    index /= inner.size;
    for (auto dim = layout.rbegin() + 1; dim != layout.rend(); ++dim) {
      offset += (index % dim->size) * dim->stride[slot];
      index /= dim->size;
    }
    const int64_t length = std::min(inner.size - first, count - done);
    run(offset, done, length);
    done += length;
  }
}

// The elements [at, at + count) of a tensor as memory holds them, one after the other: where they are, or collected in
// `room` if they lie as `layout` says.
template <int slot>
const char* load_items(char* room, const char* base, int64_t size, const Layout* layout, int64_t at, int64_t count) {
  if (layout == nullptr) {
    return base + at * size;
  }
  const int64_t step = layout->back().stride[slot];
  for_each_run<slot>(*layout, at, count, [&](int64_t offset, int64_t position, int64_t length) {
    const auto collect = size == 2 ? gather<uint16_t> : size == 4 ? gather<uint32_t> : gather<uint64_t>;
    collect(room + position * size, base + offset, step, length);
  });
  return room;
}

// Calls write(where the elements belong, or `room` for what then is spread out as `layout` says).
template <int slot, typename Write>
void store_items(
    char* room, char* base, int64_t size, const Layout* layout, int64_t at, int64_t count, const Write& write
) {
  if (layout == nullptr) {
    return write(base + at * size);
  }
  write(room);
  const int64_t step = layout->back().stride[slot];
  for_each_run<slot>(*layout, at, count, [&](int64_t offset, int64_t position, int64_t length) {
    const auto spread = size == 2 ? scatter<uint16_t> : size == 4 ? scatter<uint32_t> : scatter<uint64_t>;
    spread(base + offset, room + position * size, step, length);
  });
}

// The elements [at, at + count) of a tensor, which lie as `layout` says, or one after the other where that is nullptr.
template <int slot, typename T>
void load_block(
    const KernelTable& kernels, T* to, const char* base, Dtype dtype, const Layout* layout, int64_t at, int64_t count
) {
  alignas(64) char room[kBlock * sizeof(double)];
  const char* items = load_items<slot>(room, base, item_size(dtype), layout, at, count);
  load_contiguous(kernels, to, items, dtype, count);
}

// The same of one of a parameter's tensors, which `data` and `dtypes` have by slot. A parameter that has a remainder
// stands for its master.
template <int slot, typename T>
void load_block(
    const KernelTable& kernels,
    T* to,
    char* const* data,
    const Dtype* dtypes,
    const Layout* layout,
    int64_t at,
    int64_t count
) {
  if constexpr (slot == kParam && std::is_same_v<T, float>) {
    if (data[kRemainder] != nullptr) {
      alignas(64) char rooms[2][kBlock * sizeof(uint16_t)];
      const char* param = load_items<kParam>(rooms[0], data[kParam], sizeof(uint16_t), layout, at, count);
      const char* remainder = load_items<kRemainder>(rooms[1], data[kRemainder], sizeof(uint16_t), layout, at, count);
      return kernels.float_from_master(
          to, reinterpret_cast<const uint16_t*>(param), reinterpret_cast<const uint16_t*>(remainder), count
      );
    }
  }
  load_block<slot>(kernels, to, data[slot], dtypes[slot], layout, at, count);
}

template <int slot, typename T>
void store_block(
    const KernelTable& kernels,
    char* const* data,
    const Dtype* dtypes,
    const T* from,
    const Layout* layout,
    int64_t at,
    int64_t count
) {
  alignas(64) char room[kBlock * sizeof(double)];
  if constexpr (slot == kParam && std::is_same_v<T, float>) {
    if (data[kRemainder] != nullptr) {
      alignas(64) char other_room[kBlock * sizeof(uint16_t)];
      return store_items<kParam>(room, data[kParam], sizeof(uint16_t), layout, at, count, [&](char* param) {
        store_items<kRemainder>(
            other_room, data[kRemainder], sizeof(uint16_t), layout, at, count, [&](char* remainder) {
              kernels.master_from_float(
                  reinterpret_cast<uint16_t*>(param), reinterpret_cast<uint16_t*>(remainder), from, count
              );
            }
        );
      });
    }
  }
  store_items<slot>(room, data[slot], item_size(dtypes[slot]), layout, at, count, [&](char* items) {
    store_contiguous(kernels, items, dtypes[slot], from, count);
  });
}

}  // namespace torch_adadelta::cpu
