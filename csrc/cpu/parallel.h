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
// subnormal numbers as that one does: torch.set_flush_denormal changes the thread that calls it, and what a step
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

// Calls run(begin, end) for pieces of [0, count), which it may do in any order and on any thread.
//
// Each thread begins with a share of its own, and then takes over what is left of the others': a processor that runs
// other programs too, or wakes up late, does not keep all of them waiting.
template <typename Run>
void parallel_pieces(int64_t count, const Run& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (count + kGrain - 1) / kGrain);
  if (threads <= 1) {
    if (count > 0) {
      run(int64_t(0), count);
    }
    return;
  }
  const int64_t turn = std::max(kTurn, count / threads / kTurns);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = count * i / threads;
    shares[i].end = count * (i + 1) / threads;
  }
  parallel_ranges(threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(thread + i) % threads];
        for (int64_t begin; (begin = share.next.fetch_add(turn, std::memory_order_relaxed)) < share.end;) {
          run(begin, std::min(begin + turn, share.end));
        }
      }
    }
  });
}

}  // namespace torch_adadelta::cpu
