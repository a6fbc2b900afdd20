// Whether the memory that a call writes to belongs to one parameter only. The rules are those of
// torch_adadelta/step/validation.py: between two parameters only the parameters themselves may share memory, and are
// then updated one after the other. If they have the very same memory, as one that is listed twice, they may share
// their state, and be the gradient.
#pragma once

#include "dtypes.h"
#include "refusal.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <tuple>
#include <vector>

namespace torch_adadelta {

// How messages about a parameter call its tensors, and how those about another parameter do.
constexpr const char* kOwnNames[kTensors] = {
    "it", "its gradient", "its square_avg", "its acc_delta", "its average", "its remainder"
};
constexpr const char* kOtherNames[kTensors] = {
    "parameter ",
    "the gradient of parameter ",
    "the square_avg of parameter ",
    "the acc_delta of parameter ",
    "the average of parameter ",
    "the remainder of parameter "
};

struct MemoryRange {
  const char* begin;
  const char* end;
  bool operator==(const MemoryRange& other) const { return begin == other.begin && end == other.end; }
};

// The memory of one parameter's tensors, of which only the gradient and the optional ones may be empty.
using RowMemory = std::array<MemoryRange, kTensors>;

// The memory of all parameters of a call. Step after step it is the same, and what was found before still holds.
class AliasChecker {
 public:
  // Begins a call; without `finish` it leaves nothing that would be taken for known.
  void begin() {
    if (!is_known_) {
      rows_.clear();
    }
    is_known_ = false;
    count_ = 0;
    writes_elsewhere_ = false;
    changed_.clear();
  }

  void add(const RowMemory& row) {
    const size_t number = count_++;
    if (number == rows_.size()) {
      rows_.push_back(row);
      writes_elsewhere_ = true;
      return;
    }
    RowMemory& known = rows_[number];
    const bool same_written = is_same_parameter(known, row);
    if (same_written && known[kGrad] == row[kGrad]) {
      return;
    }
    writes_elsewhere_ |= !same_written;
    changed_.push_back(number);
    known = row;
  }

  // Whether the call writes to other memory than the one before.
  bool writes_elsewhere() const { return writes_elsewhere_ || count_ != rows_.size(); }

  // Refuses two tensors that share memory, of which one is written to. `index_of` gives the index of a row's parameter
  // in the lists.
  template <typename IndexOf>
  void finish(IndexOf index_of) {
    if (writes_elsewhere()) {
      rows_.resize(count_);
      sort(index_of);
      for (size_t row = 0; row < count_; ++row) {
        check_gradient(row, index_of);
      }
    } else {
      for (const size_t row : changed_) {
        check_gradient(row, index_of);
      }
    }
    is_known_ = true;
  }

  // Whether no parameter is listed twice.
  bool disjoint() const { return disjoint_; }

 private:
  // One tensor that is written to.
  struct Range {
    MemoryRange memory;
    size_t row;
    int slot;
  };

  template <typename IndexOf>
  void sort(IndexOf index_of) {
    sorted_.clear();
    for (size_t row = 0; row < count_; ++row) {
      for (int slot = 0; slot < kTensors; ++slot) {
        if (is_written(slot) && rows_[row][slot].begin != rows_[row][slot].end) {
          sorted_.push_back({rows_[row][slot], row, slot});
        }
      }
    }
    std::sort(sorted_.begin(), sorted_.end(), [](const Range& x, const Range& y) {
      return std::tie(x.memory.begin, x.row, x.slot) < std::tie(y.memory.begin, y.row, y.slot);
    });
    disjoint_ = true;
    for (size_t i = 1; i < sorted_.size(); ++i) {
      const Range &x = sorted_[i - 1], &y = sorted_[i];
      if (y.memory.begin < x.memory.end) {
        if (x.slot != y.slot || !is_same_parameter(rows_[x.row], rows_[y.row])) {
          const bool in_order = std::tie(x.row, x.slot) < std::tie(y.row, y.slot);
          refuse_shared(in_order ? x : y, in_order ? y : x, index_of);
        }
        disjoint_ = false;
      }
    }
  }

  static bool is_same_parameter(const RowMemory& x, const RowMemory& y) {
    bool same = true;
    for (int slot = 0; slot < kTensors; ++slot) {
      same &= !is_written(slot) || x[slot] == y[slot];
    }
    return same;
  }

  // Of the sorted ranges each ends before the next begins, or is the same.
  template <typename IndexOf>
  void check_gradient(size_t row, IndexOf index_of) const {
    const MemoryRange& gradient = rows_[row][kGrad];
    if (gradient.begin == gradient.end) {
      return;
    }
    const auto after =
        std::lower_bound(sorted_.begin(), sorted_.end(), gradient.end, [](const Range& x, const char* end) {
          return x.memory.begin < end;
        });
    if (after != sorted_.begin() && gradient.begin < (after - 1)->memory.end) {
      const Range own{gradient, row, kGrad}, &other = *(after - 1);
      const bool is_after_own = other.row == row && other.slot < kGrad;
      refuse_shared(is_after_own ? other : own, is_after_own ? own : other, index_of);
    }
  }

  template <typename IndexOf>
  [[noreturn]] void refuse_shared(const Range& x, const Range& y, IndexOf index_of) const {
    if (x.row == y.row) {
      refuse(index_of(x.row), kOwnNames[x.slot], " and ", kOwnNames[y.slot], " share memory");
    }
    refuse(
        index_of(x.row),
        kOwnNames[x.slot],
        " and ",
        kOtherNames[y.slot],
        index_of(y.row),
        " share memory that would be written to"
    );
  }

  std::vector<RowMemory> rows_;
  size_t count_ = 0;             // of the rows of this call, the first in rows_
  std::vector<size_t> changed_;  // those that were others in the call before
  std::vector<Range> sorted_;    // all tensors that are written to, by where they begin
  bool is_known_ = false;
  bool writes_elsewhere_ = false;
  bool disjoint_ = true;
};

}  // namespace torch_adadelta
