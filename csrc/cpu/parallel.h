// Elementwise work on all threads of PyTorch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <vector>

namespace torch_adadelta::cpu {

// As long as it lives, this thread calculates in the floating-point environment of another, and so keeps or flushes
// denormal numbers as that one does: torch.set_flush_denormal changes the thread that calls it, and what a step
// computes must not depend on which thread does.
class InEnvironment {
 public:
  explicit InEnvironment(const std::fenv_t& environment) {
    std::fegetenv(&own_);
    std::fesetenv(&environment);
  }
  InEnvironment(const InEnvironment&) = delete;
  InEnvironment& operator=(const InEnvironment&) = delete;
  ~InEnvironment() { std::fesetenv(&own_); }

 private:
  std::fenv_t own_;
};

// Calls run(begin, end) for ranges that together are [0, count), on a thread for each `grain` begun, if there are so
// many.
template <typename Run>
void parallel_ranges(int64_t count, int64_t grain, const Run& run) {
  if (count <= grain) {
    if (count > 0) {
      run(int64_t(0), count);
    }
    return;
  }
  std::fenv_t environment;
  std::fegetenv(&environment);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const InEnvironment caller(environment);
    run(begin, end);
  });
}

// Elements below which another thread costs more than it saves (some 10 microseconds of work).
constexpr int64_t kGrain = 32768;

// What a thread takes at a time: at least kTurn elements, and at least this part of its share, for the processor reads
// ahead in what it works on.
constexpr int64_t kTurn = 8192;
constexpr int64_t kTurns = 32;

// Calls run(begin, end) for pieces of ranges, which it may do in any order and on any thread.
//
// Each thread begins with a share of its own, and then takes over what is left of the others': a processor that runs
// other programs too, or wakes up late, does not keep all of them waiting.
class ParallelPieces {
 public:
  // For ranges of up to `most` elements. All memory is allocated here, before anything is written.
  explicit ParallelPieces(int64_t most) {
    if (most > kGrain) {
      shares_ = std::vector<Share>(std::min<int64_t>(torch::stable::get_num_threads(), (most + kGrain - 1) / kGrain));
    }
  }

  // For [0, count).
  template <typename Run>
  void operator()(int64_t count, const Run& run) {
    const int64_t threads = std::min<int64_t>(shares_.size(), (count + kGrain - 1) / kGrain);
    if (threads <= 1) {
      if (count > 0) {
        run(int64_t(0), count);
      }
      return;
    }
    const int64_t turn = std::max(kTurn, count / threads / kTurns);
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].next = count * i / threads;
      shares_[i].end = count * (i + 1) / threads;
    }
    parallel_ranges(threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        for (int64_t i = 0; i < threads; ++i) {
          Share& share = shares_[(thread + i) % threads];
          for (int64_t begin; (begin = share.next.fetch_add(turn, std::memory_order_relaxed)) < share.end;) {
            run(begin, std::min(begin + turn, share.end));
          }
        }
      }
    });
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  std::vector<Share> shares_;
};

// Runs work(entry, begin, end) for all elements of the entries, whose `end` is where theirs end in the concatenation of
// all: in one parallel call, or, unless they are disjoint, one entry after the other.
template <typename Entry, typename Work>
void for_all_elements(const std::vector<Entry>& entries, bool disjoint, ParallelPieces& pieces, const Work& work) {
  int64_t start = 0;
  if (!disjoint) {
    for (const Entry& entry : entries) {
      pieces(entry.end - start, [&](int64_t begin, int64_t end) { work(entry, begin, end); });
      start = entry.end;
    }
    return;
  }
  pieces(entries.empty() ? 0 : entries.back().end, [&](int64_t begin, int64_t end) {
    auto entry = std::upper_bound(entries.begin(), entries.end(), begin, [](int64_t position, const Entry& e) {
      return position < e.end;
    });
    int64_t start = entry == entries.begin() ? 0 : (entry - 1)->end;
    for (; begin < end; ++entry) {
      const int64_t stop = std::min(end, entry->end);
      if (begin < stop) {
        work(*entry, begin - start, stop - start);
      }
      begin = stop;
      start = entry->end;
    }
  });
}

}  // namespace torch_adadelta::cpu
