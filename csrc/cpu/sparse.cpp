// The update by sparse gradients on the CPU: the COO entries of a gradient are brought into the order of their rows,
// and all threads go over them. Whoever meets the first COO entry of a row sums up the row's gradient, in the
// order in which its COO entries were given, and updates the row.
#include "blocks.h"
#include "parallel.h"
#include "segments.h"

#include "../sparse.h"

#include <array>
#include <optional>
#include <vector>

namespace torch_adadelta::cpu {
namespace {

// ---- The order of the rows ------------------------------------------------------------------------------------------

struct CooEntry {
  int64_t row;
  int64_t position;  // in the gradient
};

// The first COO entry whose row the parameter does not have, or -1.
int64_t first_invalid_index(const SparseEntry& entry) {
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
void sort_by_row(std::vector<CooEntry>& coo_entries, int64_t rows) {
  const auto is_before = [](const CooEntry& x, const CooEntry& y) { return x.row < y.row; };
  if (std::is_sorted(coo_entries.begin(), coo_entries.end(), is_before)) {
    return;
  }
  std::vector<CooEntry> sorted(coo_entries.size());
  for (int shift = 0; shift < 64 && (rows - 1) >> shift > 0; shift += 8) {
    const auto digit = [shift](const CooEntry& x) { return (x.row >> shift) & 0xff; };
    std::array<size_t, 256> place{};
    for (const CooEntry& x : coo_entries) {
      ++place[digit(x)];
    }
    size_t begin = 0;
    for (size_t& count : place) {
      begin += std::exchange(count, begin);
    }
    for (const CooEntry& x : coo_entries) {
      sorted[place[digit(x)]++] = x;
    }
    coo_entries.swap(sorted);
  }
}

std::vector<CooEntry> coo_entries_by_row(const SparseEntry& entry) {
  std::vector<CooEntry> coo_entries(entry.indices.count);
  for (int64_t k = 0; k < entry.indices.count; ++k) {
    int64_t row = 0;
    for (int64_t d = 0; d < entry.indices.dims; ++d) {
      row = row * entry.sparse_dims[d].size + entry.indices.at(d, k);
    }
    coo_entries[k] = {row, k};
  }
  sort_by_row(coo_entries, entry.rows);
  return coo_entries;
}

// ---- One row --------------------------------------------------------------------------------------------------------

// Where the row that a COO entry names begins, in the parameter and its state.
struct Row {
  char* data[kTensors];

  Row(const SparseEntry& entry, int64_t position) {
    std::copy_n(entry.data, kTensors, data);
    for (int64_t d = 0; d < entry.indices.dims; ++d) {
      const Dimension& dim = entry.sparse_dims[d];
      const int64_t index = entry.indices.at(d, position);
      for (int slot = 0; slot < kTensors; ++slot) {
        data[slot] += index * dim.stride[slot];
      }
    }
  }
};

// The elements [begin, end) of the row that the COO entries [first, last) name. T is the opmath dtype.
template <typename T>
void update_row(
    const KernelTable& kernels,
    const SparseEntry& entry,
    const CooEntry* first,
    const CooEntry* last,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  constexpr Dtype kT = kDtypeOf<T>;
  constexpr GradientClip<T> kUnclipped = {std::numeric_limits<T>::infinity(), T(1), T(1)};
  const auto add = kernels.in<T>().add;
  const auto update = kernels.update<T>();
  const bool in_place = entry.contiguous_row && entry.dtype[kParam] == kT && entry.dtype[kFirstState] == kT;
  const Row row(entry, first->position);
  const Layout* layout = entry.contiguous_row ? nullptr : &entry.row;
  constexpr int kBlocks = kFirstOptional;
  alignas(64) T blocks[kBlocks][kBlock];
  char* data[kTensors] = {};
  for (int slot = 0; slot < kBlocks; ++slot) {
    data[slot] = reinterpret_cast<char*>(blocks[slot]);
  }
  T *grad = blocks[kGrad], *param = blocks[kParam];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    std::fill_n(grad, count, T(0));
    for (const CooEntry* coo_entry = first; coo_entry != last; ++coo_entry) {
      const Dtype dtype = entry.dtype[kGrad];
      const char* value = entry.data[kGrad] + (coo_entry->position * entry.row_numel + at) * item_size(dtype);
      if (dtype == kT) {
        add(grad, reinterpret_cast<const T*>(value), count, clip);
      } else {
        load_contiguous(kernels, param, value, dtype, count);
        add(grad, param, count, clip);
      }
    }
    if (in_place) {
      for (int slot = 0; slot < kBlocks; ++slot) {
        if (is_written(slot)) {
          data[slot] = row.data[slot] + at * static_cast<int64_t>(sizeof(T));
        }
      }
      update(data, 0, count, kUnclipped, h);
      continue;
    }
    for_each_slot<kBlocks>([&](auto slot) {
      if constexpr (is_written(slot)) {
        load_block<slot>(kernels, blocks[slot], row.data, entry.dtype, layout, at, count);
      }
    });
    update(data, 0, count, kUnclipped, h);
    for_each_slot<kBlocks>([&](auto slot) {
      if constexpr (is_written(slot)) {
        store_block<slot>(kernels, row.data, entry.dtype, blocks[slot], layout, at, count);
      }
    });
  }
}

// ---- One parameter --------------------------------------------------------------------------------------------------

// Elements of a row that a thread takes at a time, so that several can work on a long one.
constexpr int64_t kColumns = 4096;

// No processor expects the rows of a large table. They are asked for so many COO entries ahead, into the second-level
// cache: the first level would have to wait for them. This takes a third off the time of scattered rows.
constexpr int64_t kAhead = 8;
constexpr int64_t kMostBytesAhead = 1024;

// Inlined by force: GCC takes a function that only prefetches for one without effect, and drops the call.
ADADELTA_INLINE void prefetch_row(const SparseEntry& entry, int64_t position, int64_t column) {
  const Row row(entry, position);
  for (int slot = 0; slot < kTensors; ++slot) {
    if (!is_written(slot) || row.data[slot] == nullptr) {
      continue;
    }
    const int64_t size = item_size(entry.dtype[slot]);
    const int64_t bytes = std::min(std::min(kColumns, entry.row_numel - column) * size, kMostBytesAhead);
    for (int64_t byte = column * size; byte < column * size + bytes; byte += 64) {
      __builtin_prefetch(row.data[slot] + byte, 0, 2);
    }
  }
}

// A parameter with its COO entries, by their rows.
struct SortedEntry {
  const SparseEntry* entry;
  std::vector<CooEntry> coo_entries;
  int64_t end;  // as in for_all_elements

  // A row is cut into pieces of so many elements, by whose number threads are called.
  int64_t columns() const { return std::min(kColumns, entry->row_numel); }

  int64_t size() const {
    const int64_t pieces = entry->count() == 0 ? 0 : (entry->row_numel + columns() - 1) / columns();
    return pieces * entry->count() * columns();
  }
};

// The elements [begin, end) of all pieces of one parameter. Who has the first element of a COO entry takes all of
// them.
template <typename T>
void update_range(
    const KernelTable& kernels,
    const SortedEntry& sorted,
    int64_t begin,
    int64_t end,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  const SparseEntry& entry = *sorted.entry;
  const std::vector<CooEntry>& coo_entries = sorted.coo_entries;
  const auto count = static_cast<int64_t>(coo_entries.size());
  const auto is_first = [&](int64_t k) { return k == 0 || coo_entries[k].row != coo_entries[k - 1].row; };

  // The COO entries in [first, last) of which each is the first of its row, at the elements [begin, end).
  const auto update_rows = [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    for (int64_t k = first; k < last; ++k) {
      if (!is_first(k)) {
        continue;
      }
      int64_t stop = k + 1;
      while (stop < count && coo_entries[stop].row == coo_entries[k].row) {
        ++stop;
      }
      if (stop + kAhead < count) {
        prefetch_row(entry, coo_entries[stop + kAhead].position, begin);
      }
      update_row(kernels, entry, &coo_entries[k], coo_entries.data() + stop, begin, end, clip, h);
    }
  };
  const int64_t columns = sorted.columns();
  const int64_t to = (end + columns - 1) / columns;
  for (int64_t from = (begin + columns - 1) / columns; from < to;) {
    const int64_t piece = from / count;
    const int64_t first = from - piece * count;
    const int64_t last = std::min(to - piece * count, count);
    update_rows(first, last, piece * columns, std::min((piece + 1) * columns, entry.row_numel));
    from += last - first;
  }
}

// ---- The ops --------------------------------------------------------------------------------------------------------

// All that an update allocates. Made before anything is written, and run after that.
class SparseUpdate {
 public:
  explicit SparseUpdate(const SparseArguments& arguments)
      : disjoint_(arguments.entries().disjoint),
        options_(arguments.options().gradient),
        values_(arguments.options()),
        entries_(sorted(arguments.entries())),
        pieces_(entries_.empty() ? 0 : entries_.back().end) {}

  void run() {
    if (is_skipped(options_)) {
      return;
    }
    const KernelTable& kernels = current_kernels();
    for_all_elements(entries_, disjoint_, pieces_, [&](const SortedEntry& sorted, int64_t begin, int64_t end) {
      const SparseEntry& entry = *sorted.entry;
      values_.with_values(
          entry.dtype[kParam], entry.segment, entry.index, [&](const auto& clip, const auto& hyperparameters) {
            update_range(kernels, sorted, begin, end, clip, hyperparameters);
          }
      );
    });
  }

 private:
  static std::vector<SortedEntry> sorted(const SparseEntries& entries) {
    for (const SparseEntry& entry : entries.entries) {
      if (const int64_t position = first_invalid_index(entry); position >= 0) {
        refuse(entry.index, "index ", position, " of its gradient is out of range");
      }
    }
    std::vector<SortedEntry> result;
    for (const SparseEntry& entry : entries.entries) {
      if (entry.count() > 0) {
        const int64_t start = result.empty() ? 0 : result.back().end;
        SortedEntry& sorted = result.emplace_back(SortedEntry{&entry, coo_entries_by_row(entry), 0});
        sorted.end = start + sorted.size();
      }
    }
    return result;
  }

  bool disjoint_;
  const GradientOptions& options_;
  SegmentValues values_;
  std::vector<SortedEntry> entries_;
  ParallelPieces pieces_;
};

// sparse_adadelta_ in schemas.h.
void sparse_adadelta_(StableIValue* stack, uint64_t, uint64_t) {
  std::optional<SparseArguments> arguments;
  std::optional<SparseUpdate> update;
  before_writing([&] {
    arguments.emplace(ArgumentReader(stack), aoti_torch_device_type_cpu());
    update.emplace(*arguments);
  });
  if (!arguments->check_only()) {
    update->run();
  }
}

// first_invalid_indices in schemas.h.
void first_invalid_indices(StableIValue* stack, uint64_t, uint64_t) {
  before_writing([&] {
    ArgumentReader reader(stack);
    const SparseLists lists(reader, aoti_torch_device_type_cpu());
    const SparseEntries entries = lists.read();
    torch::stable::Tensor result = lists.new_result(entries);
    auto* positions = static_cast<int64_t*>(result.mutable_data_ptr());
    for (const SparseEntry& entry : entries.entries) {
      positions[entry.index] = first_invalid_index(entry);
    }
    stack[0] = torch::stable::detail::from(result);
  });
}

}  // namespace
}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CPU, m) {
  m.impl("sparse_adadelta_", torch_adadelta::cpu::sparse_adadelta_);
  m.impl("first_invalid_indices", torch_adadelta::cpu::first_invalid_indices);
}
