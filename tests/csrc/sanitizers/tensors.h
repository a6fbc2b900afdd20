// The tensors that the driver makes: matrices whose memory ends with their last element.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

#define CHECK_CODE(call)                                                                        \
  if ((call) != AOTI_TORCH_SUCCESS) {                                                           \
    throw std::runtime_error(std::string(#call) + " failed, line " + std::to_string(__LINE__)); \
  }

void check(bool condition, const std::string& what) {
  if (!condition) {
    throw std::logic_error(what);
  }
}

enum Dtype { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64, kInt16, kComplex64 };

int32_t torch_dtype(Dtype dtype) {
  const int32_t dtypes[] = {
      aoti_torch_dtype_float32(),
      aoti_torch_dtype_float64(),
      aoti_torch_dtype_float16(),
      aoti_torch_dtype_bfloat16(),
      aoti_torch_dtype_int64(),
      aoti_torch_dtype_int16(),
      aoti_torch_dtype_complex64()
  };
  return dtypes[dtype];
}

int64_t item_size(Dtype dtype) {
  return dtype == kFloat32 ? 4 : dtype == kFloat16 || dtype == kBFloat16 || dtype == kInt16 ? 2 : 8;
}

enum Order { kContiguous, kTransposed, kGaps, kUnaligned };

// Where the elements of a matrix lie, in elements from the first one.
struct Place {
  int64_t rows, columns, row_stride, column_stride, offset;

  Place(int64_t rows, int64_t columns, Order order)
      : rows(rows),
        columns(columns),
        row_stride(
            order == kTransposed ? 1
            : order == kGaps     ? 2 * columns + 1
                                 : columns
        ),
        column_stride(
            order == kTransposed ? rows
            : order == kGaps     ? 2
                                 : 1
        ),
        offset(order == kUnaligned ? 1 : 0) {}

  // Up to the end of the last element.
  int64_t length() const {
    return rows * columns == 0 ? offset : offset + (rows - 1) * row_stride + (columns - 1) * column_stride + 1;
  }
};

// A matrix of `dtype` whose element k, counted by rows, is value(k).
template <typename Value>
Tensor matrix(const Place& place, Dtype dtype, const Value& value) {
  const int64_t length = place.length(), one = 1;
  AtenTensorHandle memory = nullptr, view = nullptr;
  CHECK_CODE(aoti_torch_empty_strided(1, &length, &one, torch_dtype(dtype), aoti_torch_device_type_cpu(), 0, &memory));
  const Tensor owner(memory);
  auto* bytes = static_cast<char*>(owner.mutable_data_ptr());
  if (length > 0) {
    std::memset(bytes, 0, length * item_size(dtype));
  }
  for (int64_t k = 0; k < place.rows * place.columns; ++k) {
    const int64_t at = place.offset + k / place.columns * place.row_stride + k % place.columns * place.column_stride;
    const double number = value(k);
    switch (dtype) {
      case kFloat32:
        reinterpret_cast<float*>(bytes)[at] = static_cast<float>(number);
        break;
      case kFloat64:
        reinterpret_cast<double*>(bytes)[at] = number;
        break;
      case kFloat16:
        reinterpret_cast<Half*>(bytes)[at] = static_cast<float>(number);
        break;
      case kBFloat16:
        reinterpret_cast<BFloat16*>(bytes)[at] = static_cast<float>(number);
        break;
      case kInt64:
        reinterpret_cast<int64_t*>(bytes)[at] = static_cast<int64_t>(number);
        break;
      case kInt16:
        reinterpret_cast<int16_t*>(bytes)[at] = static_cast<int16_t>(32767 * number);
        break;
      case kComplex64:
        reinterpret_cast<float*>(bytes)[2 * at] = static_cast<float>(number);
        reinterpret_cast<float*>(bytes)[2 * at + 1] = static_cast<float>(1 - number);
        break;
    }
  }
  const std::array sizes{place.rows, place.columns}, strides{place.row_stride, place.column_stride};
  CHECK_CODE(aoti_torch__reinterpret_tensor(owner.get(), 2, sizes.data(), strides.data(), place.offset, &view));
  return Tensor(view);
}

// One number.
Tensor scalar(double value, Dtype dtype = kFloat32) {
  return matrix(Place(1, 1, kContiguous), dtype, [=](int64_t) { return value; });
}

// Numbers of either sign in [-1, 1), always the same ones for a seed.
auto noise(uint64_t seed) {
  return [seed](int64_t k) {
    uint64_t x = (seed * 1000003 + static_cast<uint64_t>(k) + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
    return static_cast<double>(x >> 33) / (1u << 30) - 1.0;
  };
}

double zero(int64_t) { return 0; }

}  // namespace
