// A small thread pool for the inside of one artefact: fork-join over a fixed number of parts.
//
// A kernel splits its work into n parts, n a compile-time constant of the artefact, so the result
// does not depend on how many threads there are or which of them runs a part. Part 0 runs on the
// calling thread. Worker w prefers part w, which keeps that part's data in its cache from layer to
// layer. A part that no worker has begun when the caller is done with its own is run by the caller:
// nobody waits for a thread that sleeps, was descheduled by a busy machine, or does not exist in
// this process (after fork() the child simply runs every part itself).
//
// POSIX threads, semaphores and the compiler's atomics only: no C++ runtime library is linked.
#ifndef SKIVE_THREADS_H
#define SKIVE_THREADS_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

class Pool {
 public:
  static constexpr int kMaxThreads = 256;

  // Starts `threads` - 1 workers. Calls nest: the workers end with the matching stop().
  void start(int threads);

  // Ends the workers. No parallel() may be running. The library that holds the pool may be unloaded
  // only after this.
  void stop();

  // Calls f(Part{i, n}) once for each i in [0, n) and returns when all have returned. `f` must not
  // care on which thread or in which order the parts run. If the pool has no workers or is serving
  // another caller (also one further up this stack), the caller runs the parts one after the other.
  template <class F>
  void parallel(int n, const F& f) {
    if (n > 1 && n <= kMaxThreads && acquire()) {
      fork_join(
          n, [](const void* function, Part part) { (*static_cast<const F*>(function))(part); }, &f);
      __atomic_store_n(&busy_, 0, __ATOMIC_RELEASE);
      return;
    }
    for (int i = 0; i < n; ++i) f(Part{i, n});
  }

 private:
  using Function = void (*)(const void*, Part);

  // A worker that finds no work looks this long for more before it sleeps: longer than a layer that
  // runs on one thread, far shorter than anyone notices in the processor's load.
  static constexpr int64_t kSpinNanoseconds = 50000;

  // Progress of one part. A cache line of its own: a worker's claim and its completion, which the
  // caller awaits, are the only words that travel between the two. Two lines, as the hardware
  // prefetches lines in pairs.
  struct alignas(128) Slot {
    uint64_t state;  // 2 * job: part claimed; 2 * job + 1: part finished. Never decreases.
  };

  struct alignas(128) Worker {
    Pool* pool;
    int index;  // 1 ... workers
    pthread_t thread;
    sem_t wake;
    int sleeping;  // 1 from the intent to sleep until someone takes on to post `wake`
  };

  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
  }

  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
  }

  bool acquire() {
    return __atomic_load_n(&workers_, __ATOMIC_ACQUIRE) > 0 &&
           __atomic_exchange_n(&busy_, 1, __ATOMIC_ACQUIRE) == 0;
  }

  // Whether the caller of this now owns `part` of `job`. False for a job that is over: all of its
  // parts were claimed, and states only grow.
  bool claim(int part, uint64_t job) {
    uint64_t* state = &slots_[part].state;
    uint64_t seen = __atomic_load_n(state, __ATOMIC_RELAXED);
    return seen < 2 * job && __atomic_compare_exchange_n(state, &seen, 2 * job, false,
                                                         __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
  }

  // Runs a claimed part. The claim keeps the job alive, so its fields may be read.
  void run(int part, int count, uint64_t job) {
    function_(context_, Part{part, count});
    __atomic_store_n(&slots_[part].state, 2 * job + 1, __ATOMIC_RELEASE);
  }

  void fork_join(int n, Function function, const void* context);
  static void wake(Worker& worker);
  static void* work(void* worker);
  uint64_t next_posting(Worker& worker, uint64_t last) const;
  int usable_processors() const;

  // Written by the caller that holds busy_, read by the workers. `posting_` is
  // (job number << 16 | number of parts), 0 parts meaning that the workers are to end; it is
  // published last and carries all that a worker must know before it has claimed a part.
  alignas(128) uint64_t posting_ = 0;
  Function function_ = nullptr;
  const void* context_ = nullptr;

  alignas(128) int busy_ = 0;
  int workers_ = 0;
  int users_ = 0;  // start() calls without their stop()
  int64_t spin_nanoseconds_ = 0;
  pid_t owner_ = 0;  // the process in which the workers live
  pthread_mutex_t lifecycle_ = PTHREAD_MUTEX_INITIALIZER;

  Slot slots_[kMaxThreads] = {};
  Worker worker_[kMaxThreads] = {};  // [0] is the caller's and unused
};

inline void Pool::fork_join(int n, Function function, const void* context) {
  function_ = function;
  context_ = context;
  const uint64_t job = (posting_ >> 16) + 1;  // the holder of busy_ is the only writer
  // Sequentially consistent, here and in next_posting(): either this thread sees that a worker is
  // about to sleep, or that worker sees this posting.
  __atomic_store_n(&posting_, job << 16 | static_cast<uint64_t>(n), __ATOMIC_SEQ_CST);
  for (int w = 1; w <= workers_ && w < n; ++w) {
    if (__atomic_load_n(&worker_[w].sleeping, __ATOMIC_SEQ_CST)) wake(worker_[w]);
  }
  function(context, Part{0, n});
  for (int part = 1; part < n; ++part) {
    if (claim(part, job)) run(part, n, job);
  }
  const auto finished = [this, job](int part) {
    return __atomic_load_n(&slots_[part].state, __ATOMIC_ACQUIRE) == 2 * job + 1;
  };
  for (int part = 1; part < n; ++part) {
    // The worker may have been descheduled in the middle of its part: then let it have this
    // processor.
    for (int i = 0; !finished(part); ++i) {
      if (i < 1000) {
        relax();
      } else {
        sched_yield();
      }
    }
  }
}

// Posts the worker's semaphore unless someone else has taken that on.
inline void Pool::wake(Worker& worker) {
  if (__atomic_exchange_n(&worker.sleeping, 0, __ATOMIC_SEQ_CST)) sem_post(&worker.wake);
}

// Waits for a posting other than `last`: spins for a while, then sleeps.
inline uint64_t Pool::next_posting(Worker& worker, uint64_t last) const {
  uint64_t posting = 0;
  const int64_t give_up = now() + spin_nanoseconds_;
  do {
    for (int i = 0; i < 64; ++i) {
      posting = __atomic_load_n(&posting_, __ATOMIC_ACQUIRE);
      if (posting != last) return posting;
      relax();
    }
  } while (now() < give_up);
  while (true) {
    __atomic_store_n(&worker.sleeping, 1, __ATOMIC_SEQ_CST);
    posting = __atomic_load_n(&posting_, __ATOMIC_SEQ_CST);
    if (posting != last && __atomic_exchange_n(&worker.sleeping, 0, __ATOMIC_SEQ_CST))
      return posting;
    // Still nothing to do, or a wake-up is on its way and has to be consumed.
    while (sem_wait(&worker.wake) != 0 && errno == EINTR) {
    }
    posting = __atomic_load_n(&posting_, __ATOMIC_ACQUIRE);
    if (posting != last) return posting;
  }
}

inline void* Pool::work(void* argument) {
  Worker& worker = *static_cast<Worker*>(argument);
  Pool& pool = *worker.pool;
  uint64_t posting = 0;
  while (true) {
    posting = pool.next_posting(worker, posting);
    const int count = static_cast<int>(posting & 0xFFFF);
    if (count == 0) return nullptr;
    for (int part = worker.index; part < count; ++part) {
      if (pool.claim(part, posting >> 16)) pool.run(part, count, posting >> 16);
    }
  }
}

// Processors that this process may run on, as far as the system tells.
inline int Pool::usable_processors() const {
#if defined(__linux__) && defined(CPU_COUNT)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

inline void Pool::start(int threads) {
  pthread_mutex_lock(&lifecycle_);
  if (users_ > 0 && owner_ != getpid()) {  // inherited by fork(): the workers stayed behind
    users_ = 0;
    workers_ = 0;
    busy_ = 0;
  }
  if (users_++ == 0) {
    owner_ = getpid();
    // With too few processors a spinning worker would only keep the others from working.
    spin_nanoseconds_ = usable_processors() >= threads ? kSpinNanoseconds : 0;
    posting_ =
        ((posting_ >> 16) + 1) << 16 | 1;  // workers begin after this one; part 0 is no worker's
    // The application's signals are for the application's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 0;
    while (started + 1 < threads && started + 1 < kMaxThreads) {
      Worker& worker = worker_[started + 1];
      worker.pool = this;
      worker.index = started + 1;
      worker.sleeping = 0;
      if (sem_init(&worker.wake, 0, 0) != 0) break;
      if (pthread_create(&worker.thread, nullptr, work, &worker) != 0) {
        sem_destroy(&worker.wake);
        break;
      }
      ++started;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    __atomic_store_n(&workers_, started, __ATOMIC_RELEASE);
  }
  pthread_mutex_unlock(&lifecycle_);
}

inline void Pool::stop() {
  pthread_mutex_lock(&lifecycle_);
  if (users_ > 0 && --users_ == 0) {
    const int started = workers_;
    __atomic_store_n(&workers_, 0, __ATOMIC_RELEASE);
    if (owner_ == getpid()) {  // a forked child has nothing to join
      __atomic_store_n(&posting_, ((posting_ >> 16) + 1) << 16, __ATOMIC_SEQ_CST);
      for (int w = 1; w <= started; ++w) {
        wake(worker_[w]);
        pthread_join(worker_[w].thread, nullptr);
        sem_destroy(&worker_[w].wake);
      }
    }
  }
  pthread_mutex_unlock(&lifecycle_);
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_THREADS_H
