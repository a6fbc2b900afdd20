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
  double seconds;
};

static void pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  sched_setaffinity(0, sizeof(set), &set);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void first(struct Game* game) {
  pin(game->processors[0]);
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
  pin(game->processors[1]);
  for (long turn = 0; turn < game->turns; ++turn) {
    while (atomic_load(&game->ball) != 2 * turn + 1) {
    }
    atomic_store(&game->ball, 2 * turn + 2);
  }
  return NULL;
}

// Seconds, or a negative number if there is no thread to be had.
double handover(int processor, int other) {
  struct Game game = {.processors = {processor, other}, .turns = 5 * kWarmUp};
  cpu_set_t before;
  pthread_t thread;
  if (sched_getaffinity(0, sizeof(before), &before) != 0 || pthread_create(&thread, NULL, second, &game) != 0) {
    return -1;
  }
  first(&game);
  pthread_join(thread, NULL);
  sched_setaffinity(0, sizeof(before), &before);
  return game.seconds;
}
