// Pairs of queries and rows of a bank, in the order of the bank.
//
// In the order of the queries each pair waits for a row from a random page of memory. Where there
// are more pairs than rows, they are sorted (by counting) by blocks of the bank that stay in L2: a
// block then comes from memory once for all queries of a group, and what one query wants of it is
// a run. A query's pairs are in one order whatever the groups and the threads: that of the blocks,
// and in a block that of its index.
#pragma once

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "subnormals.h"

namespace fastcl {

constexpr int64_t BLOCK_BYTES = 128 << 10;  // 32 pages of 4 KiB: half of a first-level TLB
constexpr int64_t GROUP_PAIRS = 1 << 20;    // that a thread sorts at once: 8 MiB
constexpr int64_t GROUP_FLOATS = 1 << 16;   // of their queries, or of those gradients: 256 KiB

// How index (N, K) is cut into pieces, up to `piece` columns of one query; from the sizes alone.
struct BankOrder {
  int64_t n, k, m, piece, pieces, group;
  int64_t blocks;  // of 1 << shift rows
  int shift = 0;

  BankOrder(int64_t n_, int64_t k_, int64_t m_, int64_t d, int64_t row_bytes)
      : n(n_), k(k_), m(m_) {
    piece = std::clamp<int64_t>(n * k / 64, 1 << 10, 1 << 13);  // enough of them for many threads
    pieces = std::max<int64_t>(1, (k + piece - 1) / piece);     // of a query
    group =
        std::clamp<int64_t>(std::min(GROUP_FLOATS / d, GROUP_PAIRS / piece), 1, 4096);  // pieces
    while (shift < 16 && row_bytes << (shift + 1) <= BLOCK_BYTES) ++shift;
    blocks = (std::max<int64_t>(m - 1, 0) >> shift) + 1;
  }
  // Sorting costs a few nanoseconds a pair, and a block is worth it if it is used again.
  bool pays() const { return n * k >= 2 * m; }
  int64_t tasks() const { return n * pieces; }
  int64_t query(int64_t task) const { return task / pieces; }
  int64_t place(int64_t task) const { return query(task) * k + task % pieces * piece; }
  int64_t columns(int64_t task) const { return std::min(piece, k - task % pieces * piece); }

  // f(first, last) of groups of pieces, in parallel: each thread's share, a group after the other.
  template <class Function>
  void for_groups(int threads, Function f) const {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; ++share) {
      const NoSubnormals fast;
      const int64_t begin = tasks() * share / threads, stop = tasks() * (share + 1) / threads;
      const int64_t groups = (stop - begin + group - 1) / group;
      for (int64_t g = 0; g < groups; ++g)
        f(begin + (stop - begin) * g / groups, begin + (stop - begin) * (g + 1) / groups);
    }
  }
};

// A pair, with what belongs to it: its place, or its gradient.
template <class With>
struct BankPair {
  uint32_t key;  // piece of the group << shift | row of the block
  With with;
};

// The pairs of the pieces first ≤ task < last, by block.
template <class With>
class SortedPairs {
 public:
  using Pair = BankPair<With>;

  // with(c) for each place c of index (N, K), all of which must be inside the bank.
  template <class Make>
  SortedPairs(const BankOrder& order, const int64_t* index, int64_t first, int64_t last, Make with)
      : order_(order),
        first_(first),
        end_(size_t(order.blocks), 0),
        memory_(size_t((last - first) * std::min(order.piece, order.k)) * sizeof(Pair)) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t at = order.place(task), stop = at + order.columns(task);
      for (int64_t c = at; c < stop; ++c) ++end_[size_t(index[c] >> order.shift)];
    }
    int64_t total = 0;
    for (int64_t& count : end_) {  // becomes the place where the block's pairs start,
      const int64_t start = total;
      total += count, count = start;
    }
    Pair* pairs = memory_.as<Pair>();
    for (int64_t task = first; task < last; ++task) {
      const uint32_t high = uint32_t(task - first) << order.shift;
      const int64_t at = order.place(task), stop = at + order.columns(task);
      for (int64_t c = at; c < stop; ++c)  // and with the last of them where they end
        pairs[end_[size_t(index[c] >> order.shift)]++] = {high | (uint32_t(index[c]) & mask()),
                                                          with(c)};
    }
  }

  // use(task, pairs, count, block's first row) for every run. ask(row) for what the next block is
  // wanted for, all of its rows or those of its pairs, evenly while this one is used.
  template <class Ask, class Use>
  void for_runs(Ask ask, Use use) const {
    const Pair* pairs = memory_.as<Pair>();
    int64_t at = 0;
    for (int64_t b = 0; b < order_.blocks; ++b) {
      const int64_t start = at, stop = end_[size_t(b)], next = (b + 1) << order_.shift;
      const int64_t rows = std::clamp<int64_t>(order_.m - next, 0, int64_t(1) << order_.shift);
      const int64_t wanted = rows == 0 ? 0 : end_[size_t(b + 1)] - stop;
      const bool all = 2 * wanted > rows;
      const int64_t asks = all ? rows : wanted;
      const int64_t per_pair = 1 + (asks << 8) / std::max<int64_t>(stop - start, 1);  // 256ths
      int64_t asked = 0;
      const auto ask_until = [&](int64_t count) {
        for (count = std::min(count, asks); asked < count; ++asked)
          ask(next + (all ? asked : row(pairs[stop + asked])));
      };
      while (at < stop) {
        const uint32_t task = pairs[at].key >> order_.shift;
        int64_t count = 1;
        while (at + count < stop && pairs[at + count].key >> order_.shift == task) ++count;
        ask_until((at + count - start) * per_pair >> 8);
        use(first_ + task, pairs + at, count, b << order_.shift);
        at += count;
      }
      ask_until(asks);
    }
  }

  uint32_t mask() const { return (uint32_t(1) << order_.shift) - 1; }
  int64_t row(const Pair& pair) const { return pair.key & mask(); }

 private:
  const BankOrder& order_;
  int64_t first_;
  std::vector<int64_t> end_;  // of each block's pairs
  Scratch memory_;
};

}  // namespace fastcl
