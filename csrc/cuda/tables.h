// What a launch says of its tensors. Each is cut into chunks, a block takes one chunk, and a table in the parameters of
// the kernel leads from the block to its tensor. There is no other memory to allocate, to copy or to wait for, and a
// CUDA graph keeps the table with the launch. More tensors than a table holds take more launches, which no GPU can run
// at once anyway.
#pragma once

#include "../tensor_lists.h"
#include "memory.cuh"

#include <cstdint>
#include <vector>

namespace torch_adadelta::cuda {

// What the parameters of a kernel may take up: since CUDA 12.1, from sm_70 on.
constexpr int64_t kParameterBytes = 32764;

// Tables of two sizes: a launch takes longer the larger its parameters are.
constexpr int kSmallTable = 64;
constexpr int kLargeTable = 600;
// What finds room in them with averages or remainders, and with both.
constexpr int kSmallTables[] = {kSmallTable, 48, 40};
constexpr int kLargeTables[] = {kLargeTable, 512, 448};
constexpr int64_t kSmallBytes = 4096;

constexpr int64_t kMaxBlocks = 2147483647;

// The chunks of the tensors in a table.
template <int capacity>
struct Chunks {
  int count = 0;                   // of tensors
  uint32_t first_block[capacity];  // that works on the tensor

  // Adds a tensor of `chunks` chunks, which must not be more than kMaxBlocks, to the `blocks` there are, and returns
  // its place; or -1 if the table is full.
  int add(int64_t chunks, int64_t& blocks) {
    if (count == capacity || blocks + chunks > kMaxBlocks) {
      return -1;
    }
    first_block[count] = static_cast<uint32_t>(blocks);
    blocks += chunks;
    return count++;
  }

  // The tensor that a block works on.
  __device__ __forceinline__ int find(uint32_t block) const {
    int low = 0;
    for (int high = count; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

// Copies the strides of `tensors` slots from `first` on, without dimensions that continue the next inner one in each of
// them. Returns false if there are more than kMaxDimensions.
template <int first, int tensors>
bool copy_layout(const Layout& layout, Strides<tensors>& to) {
  to.dimensions = 0;
  for (const Dimension& dim : layout) {
    const int64_t* stride = dim.stride + first;
    const int outer = to.dimensions - 1;
    bool continues = outer >= 0;
    for (int k = 0; continues && k < tensors; ++k) {
      continues = to.stride[outer][k] == stride[k] * dim.size;
    }
    const int place = continues ? outer : to.dimensions++;
    if (place == kMaxDimensions) {
      return false;
    }
    to.size[place] = continues ? to.size[outer] * dim.size : dim.size;
    std::copy_n(stride, tensors, to.stride[place]);
  }
  return true;
}

// Refuses parameter `index` unless a launch of so many blocks is possible, and copy_layout is for a layout, if it has
// one.
template <int first, int tensors>
void check_launch(size_t index, int64_t blocks, const Layout* layout) {
  if (blocks > kMaxBlocks) {
    refuse(index, "it or its gradient has more elements than one launch can take");
  }
  Strides<tensors> strides;
  if (layout != nullptr && !copy_layout<first>(*layout, strides)) {
    refuse(index, "it has more than ", kMaxDimensions, " dimensions");
  }
}

}  // namespace torch_adadelta::cuda
