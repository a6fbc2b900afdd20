// Whether the memory that a call writes to belongs to one parameter only. The rules are those of
// torch_adadelta/memory.py: between two parameters only the parameters themselves may share memory, and are then
// updated one after the other. If they have the very same memory, as one that is listed twice, they may share their
// state, and be the gradient.
#pragma once

#include "fail.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace torch_adadelta {

struct MemoryRange {
  const char* begin;
  const char* end;
  bool operator==(const MemoryRange& other) const { return begin == other.begin && end == other.end; }
};

// The memory of one parameter's tensors, of which only the gradient may be empty.
struct RowMemory {
  MemoryRange written[3];  // of the parameter, its square_avg and its acc_delta
  MemoryRange gradient;
};

// The memory of all parameters of a call. Step after step it is the same, and what was found before still holds.
class CallMemory {
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
    const bool same_written =
        known.written[0] == row.written[0] && known.written[1] == row.written[1] && known.written[2] == row.written[2];
    if (same_written && known.gradient == row.gradient) {
      return;
    }
    writes_elsewhere_ |= !same_written;
    changed_.push_back(number);
    known = row;
  }

  // Whether the call writes to other memory than the one before.
  bool writes_elsewhere() const { return writes_elsewhere_ || count_ != rows_.size(); }

  // Throws if two rows share memory that they must not. `index_of` gives the index of a row's parameter in the lists.
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
  // Range number `which` of those that are written to, three a row.
  struct Place {
    const char* begin;
    const char* furthest_end;  // of this and all before it
    size_t which;
  };

  static constexpr const char* kNames[] = {"parameter ", "square_avg of parameter ", "acc_delta of parameter "};

  const MemoryRange& written(size_t which) const { return rows_[which / 3].written[which % 3]; }

  template <typename IndexOf>
  void sort(IndexOf index_of) {
    sorted_.clear();
    for (size_t which = 0; which < 3 * count_; ++which) {
      sorted_.push_back({written(which).begin, written(which).end, which});
    }
    std::sort(sorted_.begin(), sorted_.end(), [](const Place& x, const Place& y) { return x.begin < y.begin; });
    disjoint_ = true;
    for (size_t i = 0; i < sorted_.size(); ++i) {
      for (size_t j = i + 1; j < sorted_.size() && sorted_[j].begin < sorted_[i].furthest_end; ++j) {
        disjoint_ = false;
        const auto [one, other] = std::minmax(sorted_[i].which, sorted_[j].which);
        if (!may_share(one, other)) {
          fail(
              kNames[one % 3],
              index_of(one / 3),
              " and ",
              kNames[other % 3],
              index_of(other / 3),
              " share memory that would be written to"
          );
        }
      }
    }
    for (size_t i = 1; i < sorted_.size(); ++i) {
      sorted_[i].furthest_end = std::max(sorted_[i].furthest_end, sorted_[i - 1].furthest_end);
    }
  }

  bool may_share(size_t one, size_t other) const {
    const size_t kind = one % 3;
    return kind == other % 3 &&
           (kind == 0 || (written(one) == written(other) && written(one - kind) == written(other - kind)));
  }

  template <typename IndexOf>
  void check_gradient(size_t row, IndexOf index_of) const {
    const MemoryRange& gradient = rows_[row].gradient;
    if (gradient.begin == gradient.end) {
      return;
    }
    const auto after = std::lower_bound(
        sorted_.begin(), sorted_.end(), gradient.end, [](const Place& x, const char* end) { return x.begin < end; }
    );
    if (after == sorted_.begin() || (after - 1)->furthest_end <= gradient.begin) {
      return;
    }
    for (size_t which = 0; which < sorted_.size(); ++which) {
      const MemoryRange& range = written(which);
      const bool overlaps = range.begin < gradient.end && gradient.begin < range.end;
      const bool is_own = which / 3 == row || (which % 3 == 0 && range == written(3 * row));
      if (overlaps && !is_own) {
        fail(
            "the gradient of parameter ",
            index_of(row),
            " and ",
            kNames[which % 3],
            index_of(which / 3),
            " share memory that would be written to"
        );
      }
    }
  }

  std::vector<RowMemory> rows_;
  size_t count_ = 0;             // of the rows of this call, the first in rows_
  std::vector<size_t> changed_;  // those that were others in the call before
  std::vector<Place> sorted_;    // all ranges, by where they begin
  bool is_known_ = false;
  bool writes_elsewhere_ = false;
  bool disjoint_ = true;
};

}  // namespace torch_adadelta
