// As much of CUDA C++ as the kernels use, for a C++ compiler: each thread of a block is a fiber, which runs until it
// waits for others. Blocks and threads take turns in an order that a seed decides, so that a result that depends on it
// shows.
#pragma once

#undef _FORTIFY_SOURCE  // whose longjmp does not leave one stack for another

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__ &  // behind the type: all threads read one copy
#define __shared__ static    // one block runs at a time

namespace emulator {

struct Index {
  unsigned x;
};

// A fiber, which runs the body once a block. It is entered by a context for the first time, then by jumps, which cost
// no system call.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  std::vector<std::byte> stack;
  unsigned index;
  bool started = false;
  bool done;
};

// Threads that wait for each other.
struct Barrier {
  unsigned expected;
  unsigned arrived = 0;
  unsigned long generation = 0;
};

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

inline Index thread_index, block_index;
inline Thread* running = nullptr;
inline jmp_buf scheduler;
inline bool progressed;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<double> exchanged;  // by the threads of a block
inline void (*body)(const void*) = nullptr;
inline const void* body_argument = nullptr;

inline unsigned seed = 0;        // 0: in order
inline int64_t edge_blocks = 0;  // so many of the first and of the last blocks run, unless 0
inline int64_t launches = 0;     // since the program began

inline void yield() {
  if (_setjmp(running->place) == 0) {
    _longjmp(scheduler, 1);
  }
}

inline void wait(Barrier& barrier) {
  progressed = true;
  const unsigned long generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    yield();
  }
  progressed = true;
}

inline void leave(Barrier& barrier) {
  --barrier.expected;
  if (barrier.expected > 0 && barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void run_thread() {
  for (;;) {
    body(body_argument);
    running->done = true;
    leave(block_barrier);  // the others no longer wait for this one
    progressed = true;
    yield();
  }
}

inline void resume(Thread& thread) {
  running = &thread;
  thread_index.x = thread.index;
  if (_setjmp(scheduler) != 0) {
    return;
  }
  if (thread.started) {
    _longjmp(thread.place, 1);
  }
  thread.started = true;
  setcontext(&thread.context);
}

inline void start(Thread& thread, unsigned index) {
  thread.index = index;
  thread.done = false;
  if (!thread.started) {
    thread.stack.resize(kStackBytes);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, run_thread, 0);
  }
}

inline std::vector<unsigned> order(unsigned count, std::mt19937& generator) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (seed != 0) {
    std::shuffle(result.begin(), result.end(), generator);
  }
  return result;
}

inline void run_block(unsigned threads, std::mt19937& generator) {
  static std::vector<Thread> fibers;
  if (fibers.size() < threads) {
    fibers = std::vector<Thread>(threads);  // none is moved while it waits
  }
  block_barrier = {threads};
  warp_barriers.assign(threads / kWarpSize, {kWarpSize});
  exchanged.assign(threads, 0.0);
  const auto turns = order(threads, generator);
  for (const unsigned index : turns) {
    start(fibers[index], index);
  }
  for (unsigned done = 0; done < threads;) {
    progressed = false;
    done = 0;
    for (const unsigned index : turns) {
      if (!fibers[index].done) {
        resume(fibers[index]);
      }
      done += fibers[index].done;
    }
    if (!progressed) {
      std::fputs("emulator: the threads of a block wait for each other forever\n", stderr);
      std::abort();
    }
  }
}

// `Argument`: a reference to the parameters, or a pointer to them.
template <typename Argument>
void launch(void (*kernel)(Argument), int64_t blocks, unsigned threads, Argument parameters) {
  if (blocks <= 0) {
    std::fputs("emulator: a launch has no blocks, which CUDA refuses\n", stderr);
    std::abort();
  }
  struct Call {
    void (*kernel)(Argument);
    Argument parameters;
  } call{kernel, parameters};
  body = [](const void* argument) {
    const auto* call = static_cast<const Call*>(argument);
    call->kernel(call->parameters);
  };
  body_argument = &call;
  ++launches;
  std::mt19937 generator(seed);
  for (const unsigned block : order(static_cast<unsigned>(blocks), generator)) {
    if (edge_blocks != 0 && block >= edge_blocks && block < blocks - edge_blocks) {
      continue;
    }
    block_index.x = block;
    run_block(threads, generator);
  }
}

inline unsigned warp_of_running() { return running->index / kWarpSize; }

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)

inline void __syncthreads() { emulator::wait(emulator::block_barrier); }

// No other thread runs meanwhile.
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address = std::min(before, value);
  return before;
}

// Every thread of a warp takes part.
inline double __shfl_down_sync(unsigned mask, double value, unsigned delta) {
  if (mask != 0xffffffff) {
    std::abort();
  }
  const unsigned index = emulator::running->index;
  auto& barrier = emulator::warp_barriers[emulator::warp_of_running()];
  emulator::exchanged[index] = value;
  emulator::wait(barrier);
  const bool in_warp = index % emulator::kWarpSize + delta < emulator::kWarpSize;
  const double result = in_warp ? emulator::exchanged[index + delta] : value;
  emulator::wait(barrier);
  return result;
}
