// The few entry points of OpenMP's runtime that the CPU kernels compile to, on threads that a race detector understands.
//
// ThreadSanitizer knows nothing of libgomp, which synchronises by system calls of its own, and would report a race at
// every barrier. Here a barrier is pthread's. The iterations of a loop are handed out by a relaxed counter: a lock would
// order the work of one thread before that of the next, and so hide races between them.
#include <pthread.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned threads) : size(threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  ~Team() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }

  unsigned size;
  pthread_barrier_t barrier;
  std::atomic<long> taken{0};  // chunks of the loop that is running
};

struct Loop {
  long start, end, step, chunk;
};

thread_local Team* team = nullptr;
thread_local int member = 0;
thread_local Loop loop;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team here(threads < 1 ? 1 : threads);
  const auto run = [&](int number) {
    Team* const outer_team = team;
    const int outer_member = member;
    team = &here;
    member = number;
    body(data);
    team = outer_team;
    member = outer_member;
  };
  std::vector<std::thread> others;
  for (unsigned number = 1; number < here.size; ++number) others.emplace_back(run, static_cast<int>(number));
  run(0);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() {
  if (team != nullptr) team->wait();
}

int omp_get_num_threads() { return team == nullptr ? 1 : static_cast<int>(team->size); }
int omp_get_thread_num() { return member; }

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  const long begin = loop.start + team->taken.fetch_add(1, std::memory_order_relaxed) * loop.chunk * loop.step;
  if (begin >= loop.end) return false;
  const long end = begin + loop.chunk * loop.step;
  *first = begin;
  *last = end < loop.end ? end : loop.end;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
  loop = {start, end, step, chunk};
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() {
  team->wait();
  if (member == 0) team->taken.store(0, std::memory_order_relaxed);
  team->wait();
}
}
