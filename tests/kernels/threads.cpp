// Exercises skive/threads.h. Usage: threads check | threads bench. Exit status 0 if all is well.
#include "skive/threads.h"

#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

namespace {

using skive::Part;
using skive::Pool;

constexpr int kParts = 4;
constexpr int kSize = 64;

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  printf("FAILED: %s\n", what);
  ++failures;
}

// One fork-join over `parts` parts that must each run exactly once.
bool each_part_once(Pool& pool, int parts) {
  int runs[Pool::kMaxThreads + 8] = {};
  pool.parallel(parts, [&](Part p) { runs[p.index] += p.count == parts ? 1 : 1000; });
  for (int i = 0; i < parts; ++i) {
    if (runs[i] != 1) return false;
  }
  return true;
}

// A chain of dependent steps: each reads what all parts of the step before have written.
int64_t chain(Pool& pool, int steps) {
  int64_t a[kSize], b[kSize];
  for (int i = 0; i < kSize; ++i) a[i] = i;
  for (int s = 0; s < steps; ++s) {
    pool.parallel(kParts, [&](Part p) {
      for (int i = kSize * p.index / p.count; i < kSize * (p.index + 1) / p.count; ++i) {
        b[i] = (3 * a[(i + 17) % kSize] + a[i]) % 1000003;
      }
    });
    memcpy(a, b, sizeof a);
  }
  int64_t sum = 0;
  for (int64_t v : a) sum += v;
  return sum;
}

void pause_ms(int ms) {
  timespec t = {0, ms * 1000000L};
  nanosleep(&t, nullptr);
}

struct Caller {
  Pool* pool;
  int64_t result;
};

void* call_chain(void* argument) {
  auto* caller = static_cast<Caller*>(argument);
  caller->result = chain(*caller->pool, 2000);
  return nullptr;
}

void check() {
  static Pool pool;
  const int64_t serial = chain(pool, 2000);  // not started: the caller runs every part
  expect(each_part_once(pool, kParts), "each part once, pool not started");

  for (int threads = 1; threads <= 5; ++threads) {  // fewer workers than parts and more
    pool.start(threads);
    for (int parts = 0; parts <= 9; ++parts) {
      expect(each_part_once(pool, parts), "each part once");
    }
    expect(each_part_once(pool, Pool::kMaxThreads), "the largest number of parts");
    expect(each_part_once(pool, Pool::kMaxThreads + 1), "more parts than the pool has slots for");
    expect(chain(pool, 2000) == serial, "the result does not depend on the threads");
    pause_ms(2);  // the workers fall asleep
    expect(each_part_once(pool, kParts), "each part once after sleep");
    pool.stop();
    expect(chain(pool, 100) == chain(pool, 100), "runs after stop");
  }

  pool.start(3);
  pool.start(3);
  pool.stop();  // the first user of two leaves
  expect(chain(pool, 2000) == serial, "starts nest");

  Caller callers[3];
  pthread_t threads[3];
  for (int i = 0; i < 3; ++i) {
    callers[i] = {&pool, 0};
    pthread_create(&threads[i], nullptr, call_chain, &callers[i]);
  }
  for (int i = 0; i < 3; ++i) {
    pthread_join(threads[i], nullptr);
    expect(callers[i].result == serial, "callers on several threads");
  }

  int inner[4] = {};
  pool.parallel(2, [&](Part outer) {
    pool.parallel(2, [&](Part p) { ++inner[2 * outer.index + p.index]; });
  });
  expect(inner[0] == 1 && inner[1] == 1 && inner[2] == 1 && inner[3] == 1, "nested calls");

  for (int i = 0; i < 40; ++i) {  // jobs around the moment at which workers go to sleep
    timespec t = {0, 30000 + 1000 * i};
    nanosleep(&t, nullptr);
    expect(each_part_once(pool, 3), "each part once around falling asleep");
  }

#if !defined(__SANITIZE_THREAD__)  // TSan does not support threads in a forked child
  const pid_t child = fork();
  if (child == 0) {
    bool ok = chain(pool, 2000) == serial;  // no workers here
    pool.start(3);
    ok = ok && chain(pool, 2000) == serial;
    pool.stop();
    pool.stop();
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child");
#endif
  expect(chain(pool, 2000) == serial, "the parent after fork");
  pool.stop();
}

double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Prints the least time of one fork-join of two parts, in nanoseconds, over many batches.
void bench() {
  static Pool pool;
  pool.start(2);
  // `work` is a number of additions per part, one after the other.
  for (int work = 1; work <= 10000; work *= 10) {
    double fork_join = 1, serial = 1;
    volatile int64_t sink[2 * 16];
    const auto part = [&](Part p) {
      int64_t sum = p.index;
      for (int i = 0; i < work; ++i) {
        sum += i;
        __asm__ volatile("" : "+r"(sum));
      }
      sink[16 * p.index] = sum;
    };
    const int repeats = 200000 / (work + 100) + 10;
    for (int batch = 0; batch < 200; ++batch) {
      double begin = seconds();
      for (int i = 0; i < repeats; ++i) pool.parallel(2, part);
      const double both = (seconds() - begin) / repeats;
      begin = seconds();
      for (int i = 0; i < repeats; ++i) {
        part(Part{0, 2});
        part(Part{1, 2});
      }
      const double one = (seconds() - begin) / repeats;
      if (both < fork_join) fork_join = both;
      if (one < serial) serial = one;
    }
    printf("%6d additions per part: serial %8.0f ns, fork-join %8.0f ns\n", work, 1e9 * serial,
           1e9 * fork_join);
  }
  double asleep = 1;
  for (int i = 0; i < 200; ++i) {
    pause_ms(1);
    const double begin = seconds();
    pool.parallel(2, [](Part) {});
    const double time = seconds() - begin;
    if (time < asleep) asleep = time;
  }
  printf("fork-join with a sleeping worker: %.0f ns\n", 1e9 * asleep);
  pool.stop();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && strcmp(argv[1], "bench") == 0) {
    bench();
  } else {
    check();
    if (failures == 0) printf("ok\n");
  }
  return failures == 0 ? 0 : 1;
}
