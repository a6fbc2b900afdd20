// How long a line of memory takes from one processor to another: two threads, pinned to them, pass it to and fro.
// Compiled by measure.py.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

enum { kWarmUp = 1000 };

struct Game {
  _Alignas(128) _Atomic long ball;  // even: the first thread's turn, which makes it odd
  _Alignas(128) int processors[2];
  long turns;
  _Atomic int is_pinned;  // the second thread: 1, or -1 if it cannot be
  double seconds;
};

// Whether the calling thread now runs there and nowhere else.
static int pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  return sched_setaffinity(0, sizeof(set), &set) == 0;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void first(struct Game* game) {
  double start = 0;
  for (long turn = 0; turn < game->turns; ++turn) {
    if (turn == kWarmUp) {
      start = now();
    }
    atomic_store(&game->ball, 2 * turn + 1);
    while (atomic_load(&game->ball) != 2 * turn + 2) {
    }
  }
  game->seconds = (now() - start) / (game->turns - kWarmUp) / 2;
}

static void* second(void* context) {
  struct Game* game = context;
  const int is_pinned = pin(game->processors[1]);
  atomic_store(&game->is_pinned, is_pinned ? 1 : -1);
  for (long turn = 0; is_pinned && turn < game->turns; ++turn) {
    while (atomic_load(&game->ball) != 2 * turn + 1) {
    }
    atomic_store(&game->ball, 2 * turn + 2);
  }
  return NULL;
}

// Seconds, or a negative number if two threads cannot be had and pinned: unpinned, both might share a processor and
// wait for each other's time slices.
double handover(int processor, int other) {
  struct Game game = {.processors = {processor, other}, .turns = 5 * kWarmUp};
  cpu_set_t before;
  pthread_t thread;
  if (sched_getaffinity(0, sizeof(before), &before) != 0 || !pin(processor)) {
    return -1;
  }
  game.seconds = -1;
  if (pthread_create(&thread, NULL, second, &game) == 0) {
    while (atomic_load(&game.is_pinned) == 0) {
      sched_yield();
    }
    if (atomic_load(&game.is_pinned) == 1) {
      first(&game);
    }
    pthread_join(thread, NULL);
  }
  sched_setaffinity(0, sizeof(before), &before);
  return game.seconds;
}
