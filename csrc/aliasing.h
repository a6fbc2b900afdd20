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
#include <vector>

namespace torch_adadelta {

// How messages about a parameter call its tensors, and how those about another parameter do.
constexpr const char* kOwnNames[kTensors] = {"it", "its gradient", "its square_avg", "its acc_delta"};
constexpr const char* kOtherNames[kTensors] = {
    "parameter ", "the gradient of parameter ", "the square_avg of parameter ", "the acc_delta of parameter "
};

struct MemoryRange {
  const char* begin;
  const char* end;
  bool operator==(const MemoryRange& other) const { return begin == other.begin && end == other.end; }
};

// The memory of one parameter's tensors, of which only the gradient may be empty.
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
    bool same_written = true;
    for (int slot = 0; slot < kTensors; ++slot) {
      same_written &= !is_written(slot) || known[slot] == row[slot];
    }
    if (same_written && known[kGrad] == row[kGrad]) {
      return;
    }
    writes_elsewhere_ |= !same_written;
    changed_.push_back(number);
    known = row;
  }

  // Whether the call writes to other memory than the one before.
  bool writes_elsewhere() const { return writes_elsewhere_ || count_ != rows_.size(); }

  // Refuses two rows that share memory that they must not. `index_of` gives the index of a row's parameter in the
  // lists.
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

  // Whether no memory that is written to belongs to two rows.
  bool disjoint() const { return disjoint_; }

 private:
  // One range that is written to.
  struct Range {
    const char* begin;
    const char* furthest_end;  // of this and all before it
    size_t row;
    int slot;
  };

  template <typename IndexOf>
  void sort(IndexOf index_of) {
    sorted_.clear();
    for (size_t row = 0; row < count_; ++row) {
      for (int slot = 0; slot < kTensors; ++slot) {
        if (is_written(slot)) {
          sorted_.push_back({rows_[row][slot].begin, rows_[row][slot].end, row, slot});
        }
      }
    }
    std::sort(sorted_.begin(), sorted_.end(), [](const Range& x, const Range& y) { return x.begin < y.begin; });
    disjoint_ = true;
    for (size_t i = 0; i < sorted_.size(); ++i) {
      for (size_t j = i + 1; j < sorted_.size() && sorted_[j].begin < sorted_[i].furthest_end; ++j) {
        disjoint_ = false;
        const Range &x = sorted_[i], &y = sorted_[j];
        if (!may_share(x, y)) {
          const bool in_order = x.row < y.row || (x.row == y.row && x.slot < y.slot);
          in_order ? refuse_shared(x.row, x.slot, y, index_of) : refuse_shared(y.row, y.slot, x, index_of);
        }
      }
    }
    for (size_t i = 1; i < sorted_.size(); ++i) {
      sorted_[i].furthest_end = std::max(sorted_[i].furthest_end, sorted_[i - 1].furthest_end);
    }
  }

  bool may_share(const Range& x, const Range& y) const {
    const RowMemory &one = rows_[x.row], &other = rows_[y.row];
    return x.slot == y.slot && (x.slot == kParam || (one[x.slot] == other[x.slot] && one[kParam] == other[kParam]));
  }

  template <typename IndexOf>
  void check_gradient(size_t row, IndexOf index_of) const {
    const MemoryRange& gradient = rows_[row][kGrad];
    if (gradient.begin == gradient.end) {
      return;
    }
    const auto after = std::lower_bound(
        sorted_.begin(), sorted_.end(), gradient.end, [](const Range& x, const char* end) { return x.begin < end; }
    );
    if (after == sorted_.begin() || (after - 1)->furthest_end <= gradient.begin) {
      return;
    }
    for (size_t other = 0; other < count_; ++other) {
      for (int slot = 0; slot < kTensors; ++slot) {
        const MemoryRange& range = rows_[other][slot];
        const bool overlaps = is_written(slot) && range.begin < gradient.end && gradient.begin < range.end;
        const bool is_own = other == row || (slot == kParam && range == rows_[row][kParam]);
        if (overlaps && !is_own) {
          refuse_shared(row, kGrad, {range.begin, range.end, other, slot}, index_of);
        }
      }
    }
  }

  template <typename IndexOf>
  [[noreturn]] void refuse_shared(size_t row, int slot, const Range& other, IndexOf index_of) const {
    refuse(
        index_of(row),
        kOwnNames[slot],
        " and ",
        kOtherNames[other.slot],
        index_of(other.row),
        " share memory that would be written to"
    );
  }

  std::vector<RowMemory> rows_;
  size_t count_ = 0;             // of the rows of this call, the first in rows_
  std::vector<size_t> changed_;  // those that were others in the call before
  std::vector<Range> sorted_;    // all ranges that are written to, by where they begin
  bool is_known_ = false;
  bool writes_elsewhere_ = false;
  bool disjoint_ = true;
};

}  // namespace torch_adadelta
