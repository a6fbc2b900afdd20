// The update by sparse gradients on the CPU: the occurrences of a gradient are brought into the order of their rows,
// and all threads go over them. Whoever meets the first occurrence of a row sums up the row's gradient, in the
// order in which its occurrences were given, and updates the row.
#include "blocks.h"
#include "loops.h"
#include "options.h"
#include "parallel.h"

#include "../sparse.h"

#include <torch/csrc/stable/ops.h>

#include <array>

namespace torch_adadelta::cpu {
namespace {

// ---- The order of the rows ------------------------------------------------------------------------------------------

struct Occurrence {
  int64_t row;
  int64_t position;  // in the gradient
};

// The first occurrence whose row the parameter does not have, or -1.
int64_t first_bad_index(const SparseEntry& entry) {
  int64_t first = entry.indices.count;
  for (int64_t d = 0; d < entry.indices.dims; ++d) {
    const auto size = static_cast<uint64_t>(entry.sparse_dims[d].size);
    for (int64_t k = 0; k < first; ++k) {
      if (static_cast<uint64_t>(entry.indices.at(d, k)) >= size) {
        first = k;
      }
    }
  }
  return first == entry.indices.count ? -1 : first;
}

// A stable sort by the row, a byte at a time.
void sort_by_row(std::vector<Occurrence>& occurrences, int64_t rows) {
  const auto is_before = [](const Occurrence& x, const Occurrence& y) { return x.row < y.row; };
  if (std::is_sorted(occurrences.begin(), occurrences.end(), is_before)) {
    return;
  }
  std::vector<Occurrence> sorted(occurrences.size());
  for (int shift = 0; shift < 64 && (rows - 1) >> shift > 0; shift += 8) {
    const auto digit = [shift](const Occurrence& x) { return (x.row >> shift) & 0xff; };
    std::array<size_t, 256> place{};
    for (const Occurrence& x : occurrences) {
      ++place[digit(x)];
    }
    size_t begin = 0;
    for (size_t& count : place) {
      begin += std::exchange(count, begin);
    }
    for (const Occurrence& x : occurrences) {
      sorted[place[digit(x)]++] = x;
    }
    occurrences.swap(sorted);
  }
}

std::vector<Occurrence> occurrences_by_row(const SparseEntry& entry) {
  std::vector<Occurrence> occurrences(entry.indices.count);
  for (int64_t k = 0; k < entry.indices.count; ++k) {
    int64_t row = 0;
    for (int64_t d = 0; d < entry.indices.dims; ++d) {
      row = row * entry.sparse_dims[d].size + entry.indices.at(d, k);
    }
    occurrences[k] = {row, k};
  }
  sort_by_row(occurrences, entry.rows);
  return occurrences;
}

// ---- One row --------------------------------------------------------------------------------------------------------

// Where the row that an occurrence names begins.
struct Row {
  char* param;
  char* square_avg;
  char* acc_delta;

  Row(const SparseEntry& entry, int64_t position)
      : param(entry.param), square_avg(entry.square_avg), acc_delta(entry.acc_delta) {
    for (int64_t d = 0; d < entry.indices.dims; ++d) {
      const Dimension& dim = entry.sparse_dims[d];
      const int64_t index = entry.indices.at(d, position);
      param += index * dim.param;
      square_avg += index * dim.square_avg;
      acc_delta += index * dim.acc_delta;
    }
  }
};

template <typename T>
auto loops_of(const Loops& loops) {
  if constexpr (std::is_same_v<T, float>) {
    return std::pair(loops.add_float, loops.update_row_float);
  } else {
    return std::pair(loops.add_double, loops.update_row_double);
  }
}

// The elements [begin, end) of the row that the occurrences [first, last) name. T is the arithmetic type.
template <typename T>
void update_row(
    const Loops& loops,
    const SparseEntry& entry,
    const Occurrence* first,
    const Occurrence* last,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  constexpr Dtype kT = std::is_same_v<T, float> ? Dtype::kFloat32 : Dtype::kFloat64;
  const auto [add, update] = loops_of<T>(loops);
  const Row row(entry, first->position);
  const Layout* layout = entry.contiguous_row ? nullptr : &entry.row;
  alignas(64) T grad[kBlock], buffer[kBlock], square_avg[kBlock], acc_delta[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    std::fill_n(grad, count, T(0));
    for (const Occurrence* occurrence = first; occurrence != last; ++occurrence) {
      const char* value = entry.values + (occurrence->position * entry.row_numel + at) * item_size(entry.value_dtype);
      if (entry.value_dtype == kT) {
        add(grad, reinterpret_cast<const T*>(value), count, clip);
      } else {
        load_contiguous(loops, buffer, value, entry.value_dtype, count);
        add(grad, buffer, count, clip);
      }
    }
    if (layout == nullptr && entry.dtype == kT) {
      update(
          reinterpret_cast<T*>(row.param) + at,
          grad,
          reinterpret_cast<T*>(row.square_avg) + at,
          reinterpret_cast<T*>(row.acc_delta) + at,
          count,
          h
      );
      continue;
    }
    T* param = buffer;
    load_block<&Dimension::param>(loops, param, row.param, entry.dtype, layout, at, count);
    load_block<&Dimension::square_avg>(loops, square_avg, row.square_avg, entry.dtype, layout, at, count);
    load_block<&Dimension::acc_delta>(loops, acc_delta, row.acc_delta, entry.dtype, layout, at, count);
    update(param, grad, square_avg, acc_delta, count, h);
    store_block<&Dimension::param>(loops, row.param, entry.dtype, param, layout, at, count);
    store_block<&Dimension::square_avg>(loops, row.square_avg, entry.dtype, square_avg, layout, at, count);
    store_block<&Dimension::acc_delta>(loops, row.acc_delta, entry.dtype, acc_delta, layout, at, count);
  }
}

// ---- One parameter --------------------------------------------------------------------------------------------------

// Elements of a row that a thread takes at a time, so that several can work on a long one.
constexpr int64_t kColumns = 4096;

// No processor expects the rows of a large table. They are asked for so many occurrences ahead, into the second-level
// cache: the first level would have to wait for them. This takes a third off the time of scattered rows.
constexpr int64_t kAhead = 8;
constexpr int64_t kMostBytesAhead = 1024;

// Inlined by force: GCC takes a function that only prefetches for one without effect, and drops the call.
ADADELTA_INLINE void prefetch_row(const SparseEntry& entry, int64_t position, int64_t column) {
  const Row row(entry, position);
  const int64_t size = item_size(entry.dtype);
  const int64_t bytes = std::min(std::min(kColumns, entry.row_numel - column) * size, kMostBytesAhead);
  for (int64_t byte = column * size; byte < column * size + bytes; byte += 64) {
    __builtin_prefetch(row.param + byte, 0, 2);
    __builtin_prefetch(row.square_avg + byte, 0, 2);
    __builtin_prefetch(row.acc_delta + byte, 0, 2);
  }
}

template <typename T>
void update_entry(
    const Loops& loops, const SparseEntry& entry, const GradientClip<T>& clip, const Hyperparameters<T>& h
) {
  const std::vector<Occurrence> occurrences = occurrences_by_row(entry);
  const auto count = static_cast<int64_t>(occurrences.size());
  const auto is_first = [&](int64_t k) { return k == 0 || occurrences[k].row != occurrences[k - 1].row; };

  // The occurrences in [first, last) of which each is the first of its row, at the elements [begin, end).
  const auto update_rows = [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    for (int64_t k = first; k < last; ++k) {
      if (!is_first(k)) {
        continue;
      }
      int64_t stop = k + 1;
      while (stop < count && occurrences[stop].row == occurrences[k].row) {
        ++stop;
      }
      if (stop + kAhead < count) {
        prefetch_row(entry, occurrences[stop + kAhead].position, begin);
      }
      update_row(loops, entry, &occurrences[k], occurrences.data() + stop, begin, end, clip, h);
    }
  };
  const int64_t columns = std::min(kColumns, entry.row_numel);
  const int64_t pieces = (entry.row_numel + columns - 1) / columns;
  // In elements, for by their number threads are called; who has the first element of an occurrence takes all of them.
  parallel_pieces(pieces * count * columns, [&](int64_t begin, int64_t end) {
    const int64_t to = (end + columns - 1) / columns;
    for (int64_t from = (begin + columns - 1) / columns; from < to;) {
      const int64_t piece = from / count;
      const int64_t first = from - piece * count;
      const int64_t last = std::min(to - piece * count, count);
      update_rows(first, last, piece * columns, std::min((piece + 1) * columns, entry.row_numel));
      from += last - first;
    }
  });
}

// ---- The ops --------------------------------------------------------------------------------------------------------

// sparse_adadelta_ in schemas.h.
void sparse_adadelta_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  const SparseLists lists(stack, aoti_torch_device_type_cpu());
  const OptionArguments given(stack, argument_count, 5);
  const SparseEntries entries = lists.read();
  const UpdateOptions options = given.read(lists.place(entries), lists.size(), entries.complex_param);
  check_values(entries);
  for (const SparseEntry& entry : entries.entries) {
    if (const int64_t bad = first_bad_index(entry); bad >= 0) {
      fail("index ", bad, " of the gradient of parameter ", entry.index, " is out of range");
    }
  }
  if (is_skipped(options)) {
    return;
  }
  const double lr = value_of(options.lr), rho = value_of(options.rho), epsilon = value_of(options.epsilon);
  const double factor = value_of(options.factor);
  const Loops& loops = current_loops();
  for (const SparseEntry& entry : entries.entries) {
    if (entry.count() == 0) {
      continue;
    }
    if (entry.dtype == Dtype::kFloat64) {
      const auto clip = clip_of<double>(options, entry.index, factor);
      update_entry(loops, entry, clip, Hyperparameters<double>(lr, rho, epsilon));
    } else {
      const auto clip = clip_of<float>(options, entry.index, factor);
      update_entry(loops, entry, clip, Hyperparameters<float>(lr, rho, epsilon));
    }
  }
}

// first_bad_indices in schemas.h.
void first_bad_indices(StableIValue* stack, uint64_t, uint64_t) {
  const SparseLists lists(stack, aoti_torch_device_type_cpu());
  const SparseEntries entries = lists.read();
  torch::stable::Tensor result = lists.new_result(entries);
  auto* positions = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const SparseEntry& entry : entries.entries) {
    positions[entry.index] = first_bad_index(entry);
  }
  stack[0] = torch::stable::detail::from(result);
}

}  // namespace
}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) {
  m.impl("sparse_adadelta_", torch_adadelta::cpu::sparse_adadelta_);
  m.impl("first_bad_indices", torch_adadelta::cpu::first_bad_indices);
}
