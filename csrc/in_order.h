// Tasks that run at the same time and still add up in one order, whatever the number of threads.
//
// Threads take the tasks in their order. Where a task touches what others touch too (the sums of a
// block of rows), it waits for its turn: the number of tasks before it that touch that block. A
// task waits only for earlier ones, which some thread has already taken, so there is no deadlock;
// and the orders below let neighbouring tasks touch different blocks, so there is little waiting.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include <omp.h>

#include "simd.h"
#include "subnormals.h"

namespace fastcl {

class Turns {
 public:
  explicit Turns(int64_t blocks) : done_(new Counter[size_t(blocks)]) {}

  void wait(int64_t block, int64_t turn) const {
    for (int spins = 0; done_[block].count.load(std::memory_order_acquire) != turn; ++spins)
      if (spins > 2000) std::this_thread::yield();
  }
  void next(int64_t block) { done_[block].count.fetch_add(1, std::memory_order_release); }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> count{0};
  };
  std::unique_ptr<Counter[]> done_;
};

// f(task, thread) for every task, taken in order.
template <class Function>
inline void in_order(int64_t tasks, int threads, Function f) {
  if (threads <= 1 || tasks <= 1) {
    const NoSubnormals fast;
    for (int64_t task = 0; task < tasks; ++task) f(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const NoSubnormals fast;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      f(task, omp_get_thread_num());
  }
}

struct BlockPair {
  int64_t i, j;            // blocks of rows and of columns; i < 0: no pair
  int64_t turn_i, turn_j;  // how many earlier pairs hold i, j
};

// All pairs of `rows` × `columns` blocks: a Latin square, so that in a round no block appears
// twice.
struct Rectangle {
  int64_t rows, columns;
  int64_t tasks() const { return rows * columns; }
  BlockPair pair(int64_t task) const {
    const int64_t few = std::min(rows, columns), many = std::max(rows, columns);
    const int64_t round = task / few, a = task % few, b = (a + round) % many;
    // b meets a in round (b − a) mod many: first the a ≤ b downwards, then those above.
    const int64_t turn_b = b >= few - 1 ? few - 1 - a : a <= b ? b - a : b + few - a;
    return rows <= columns ? BlockPair{a, b, round, turn_b} : BlockPair{b, a, turn_b, round};
  }
};

// All pairs i ≤ j of n blocks: in round r meet those with i + j ≡ r mod n, every block once.
struct Triangle {
  int64_t n;
  int64_t slots() const { return n / 2 + 1; }
  int64_t tasks() const { return n * slots(); }
  BlockPair pair(int64_t task) const {
    const int64_t round = task / slots(), slot = task % slots();
    const int64_t below = round / 2 + 1;  // pairs with i + j = round; the others have round + n
    if (slot < below) return {slot, round - slot, round, round};
    const int64_t i = round + 1 + slot - below, j = n - 1 - (slot - below);
    return i <= j ? BlockPair{i, j, round, round} : BlockPair{-1, -1, 0, 0};
  }
};

}  // namespace fastcl
