// Pairs of queries and rows of a bank, in the order of the bank.
//
// In the order of the queries each pair waits for a row from a random page of memory. Where there
// are more pairs than rows, they are sorted (by counting, twice): by ranges of the bank, each of
// which one thread takes, and in a range by blocks that stay in L2. A block then comes from memory
// once for all queries of a group. In a block the pairs are in the order of the index, whatever the
// number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "subnormals.h"

namespace fastcl {

constexpr int64_t BLOCK_BYTES = 256 << 10;  // of two that are in L2, this one and the next
constexpr int64_t GROUP_PAIRS = 1 << 21;    // sorted at once: twice 16 MiB
constexpr int64_t GROUP_FLOATS = 1 << 16;   // of their queries, or of those gradients: 256 KiB
constexpr int64_t RANGES = 64;              // at most, unless that is more than 2^20 rows each

// How the pairs of index (N, K) are grouped, and the bank cut; from the sizes alone.
struct BankOrder {
  int64_t n, k, m, groups, ranges;
  int range_shift = 0, block_shift = 0;  // of 1 << shift rows

  BankOrder(int64_t n_, int64_t k_, int64_t m_, int64_t d, int64_t row_bytes)
      : n(n_), k(k_), m(m_) {
    const int64_t queries = std::clamp<int64_t>(GROUP_FLOATS / d, 1, 2048);
    const int64_t most = std::min(queries * k, GROUP_PAIRS);
    groups = most > 0 ? (n * k + most - 1) / most : 0;
    while (range_shift < 20 && RANGES << range_shift < m) ++range_shift;
    ranges = (std::max<int64_t>(m - 1, 0) >> range_shift) + 1;
    while (block_shift < range_shift && row_bytes << (block_shift + 1) <= BLOCK_BYTES)
      ++block_shift;
  }
  // Sorting costs a few nanoseconds a pair, and a block is worth it if it is used again.
  bool pays() const { return n * k >= 2 * m; }
  int64_t first(int64_t g) const { return n * k * g / groups; }  // pair of a group
  int64_t query0(int64_t g) const { return first(g) / k; }
  int64_t queries(int64_t g) const { return (first(g + 1) - 1) / k + 1 - query0(g); }
  int64_t row0(int64_t range) const { return range << range_shift; }
};

// A pair, with what belongs to it: its place, or its gradient.
template <class With>
struct BankPair {
  uint32_t key;  // query of the group << range_shift | row of the range
  With with;
};

// The pairs of a group by ranges and blocks.
template <class With>
class SortedPairs {
 public:
  using Pair = BankPair<With>;

  // with(c) for each place c of index (N, K), all of which must be inside the bank.
  template <class Make>
  SortedPairs(const BankOrder& order, const int64_t* index, int64_t group, int threads, Make with)
      : order_(order),
        by_range_(size_t(order.first(group + 1) - order.first(group)) * sizeof(Pair)),
        by_block_(size_t(order.first(group + 1) - order.first(group)) * sizeof(Pair)),
        starts_(size_t(order.ranges) + 1) {
    const int64_t first = order.first(group), count = order.first(group + 1) - first;
    const int64_t ranges = order.ranges, query0 = order.query0(group);
    const int shift = order.range_shift;
    const auto share = [&](int64_t s) { return first + count * s / threads; };
    const int64_t stride = ranges + 8;  // no share writes to a cache line of another
    std::vector<int64_t> at(size_t(threads * stride), 0);  // of each: how many, then where to
    int64_t* places = at.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t s = 0; s < threads; ++s) {
      int64_t* counts = places + s * stride;
      const int64_t stop = share(s + 1);
      for (int64_t c = share(s); c < stop; ++c) ++counts[index[c] >> shift];
    }
    int64_t total = 0;
    for (int64_t r = 0; r < ranges; ++r) {
      starts_[size_t(r)] = total;
      for (int64_t s = 0; s < threads; ++s) {
        const int64_t place = total;
        total += places[s * stride + r], places[s * stride + r] = place;
      }
    }
    starts_[size_t(ranges)] = total;
    Pair* pairs = by_range_.template as<Pair>();
    const uint32_t mask = (uint32_t(1) << shift) - 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t s = 0; s < threads; ++s) {
      int64_t* to = places + s * stride;
      const int64_t stop = share(s + 1);
      for (int64_t c = share(s), next; c < stop; c = next) {
        const int64_t query = c / order.k;
        next = std::min(stop, (query + 1) * order.k);
        const uint32_t high = uint32_t(query - query0) << shift;
        for (int64_t i = c; i < next; ++i)
          pairs[to[index[i] >> shift]++] = {high | (uint32_t(index[i]) & mask), with(i)};
      }
    }
  }

  // use(pairs, left), which returns how many of a block's `left` pairs it used, for the blocks of a
  // range. ask(row of the range) for what the next block is wanted for, all of its rows or those of
  // its pairs, evenly while this one is used.
  template <class Ask, class Use>
  void for_blocks(int64_t range, Ask ask, Use use) const {
    const std::vector<int64_t> ends = sort_blocks(range);
    const Pair* pairs = by_block_.template as<Pair>();
    const int64_t block_rows = int64_t(1) << order_.block_shift;
    int64_t at = starts_[size_t(range)];
    for (size_t b = 0; b < ends.size(); ++b) {
      const bool last = b + 1 == ends.size();
      const int64_t start = at, stop = ends[b], next = int64_t(b + 1) << order_.block_shift;
      const int64_t rows = last ? 0 : std::min(rows_of(range) - next, block_rows);
      const int64_t wanted = last ? 0 : ends[b + 1] - stop;
      const bool all = 2 * wanted > rows;
      const int64_t asks = all ? rows : wanted;
      const int64_t per_pair = 1 + (asks << 8) / std::max<int64_t>(stop - start, 1);  // 256ths
      int64_t asked = 0;
      const auto ask_until = [&](int64_t count) {
        for (count = std::min(count, asks); asked < count; ++asked)
          ask(all ? next + asked : row(pairs[stop + asked]));
      };
      while (at < stop) {
        at += use(pairs + at, stop - at);
        ask_until((at - start) * per_pair >> 8);
      }
      ask_until(asks);
    }
  }

  int64_t query(const Pair& pair) const { return pair.key >> order_.range_shift; }  // of the group
  int64_t row(const Pair& pair) const {                                             // of the range
    return pair.key & ((uint32_t(1) << order_.range_shift) - 1);
  }

  // How many of these pairs are, like the first, of its query.
  int64_t run(const Pair* pairs, int64_t left) const {
    const int64_t first = query(*pairs);
    int64_t count = 1;
    while (count < left && query(pairs[count]) == first) ++count;
    return count;
  }

 private:
  int64_t rows_of(int64_t range) const {
    return std::min(order_.m - order_.row0(range), int64_t(1) << order_.range_shift);
  }

  // Sorts a range's pairs by blocks; returns where each block's end.
  std::vector<int64_t> sort_blocks(int64_t range) const {
    const Pair* pairs = by_range_.template as<Pair>();
    Pair* sorted = by_block_.template as<Pair>();
    const int64_t start = starts_[size_t(range)], stop = starts_[size_t(range) + 1];
    std::vector<int64_t> ends(size_t((rows_of(range) - 1) >> order_.block_shift) + 1, 0);
    int64_t* to = ends.data();
    for (int64_t p = start; p < stop; ++p) ++to[row(pairs[p]) >> order_.block_shift];
    int64_t total = start;
    for (int64_t& count : ends) {  // becomes the place where the block's pairs start,
      const int64_t at = total;
      total += count, count = at;
    }
    for (int64_t p = start; p < stop; ++p)  // and with the last of them where they end
      sorted[to[row(pairs[p]) >> order_.block_shift]++] = pairs[p];
    return ends;
  }

  const BankOrder& order_;
  Scratch by_range_, by_block_;
  std::vector<int64_t> starts_;  // of each range's pairs
};

}  // namespace fastcl
