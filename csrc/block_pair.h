// One block of rows against one block of columns: what similarity_lse and self_similarity_lse
// share.
//
//   s_ij = t · q̂_i·k̂_j        a strip of rows at a time, used while it is in L1
//   forward    Σ_j exp s_ij, Σ_i exp s_ij, Σ_j exp(s_ij) k̂_j
//   backward   W_ij = g_i exp(s_ij − a_i) + h_j exp(s_ij − b_j);   dq += W k̂,   dk += Wᵀ q̂
//
// A block of W stays in L2 between the exponentials and the products.
#pragma once

#include "in_order.h"
#include "packed.h"
#include "prefetch.h"
#include "scratch.h"
#include "strip.h"

namespace fastcl {

// Floats from one row of a block of s or W to the next: an odd number of cache lines, so that
// walking down a column does not meet the same few sets of L1. Two bfloat16 take one float's place.
constexpr int64_t W_ROW = BLOCK_MAX + 16;

template <bool PAIRED>
struct WordsOf {
  using type = FloatWords;
};
#if defined(__AVX512BF16__)
template <>
struct WordsOf<true> {
  using type = BFloat16Pairs;
};
#endif

// What one thread works in.
struct Workspace {
  float* s;        // (block, W_ROW), or one strip of it
  float* w_rows;   // (block, W_ROW / 2) bfloat16 rows, PAIRED only
  float* w_pairs;  // (block / 2, W_ROW) bfloat16 pairs of rows, PAIRED only
  float* mean;     // (panels, block, NR)
  float* packed;   // a block of keys packed where it is used
  float* packing;  // NR rows on their way there
  float* sums;     // 8 × (BLOCK_MAX,)
};

class Workspaces {
 public:
  Workspaces(int threads, bool paired, int64_t mean, int64_t packed, int64_t packing)
      : sizes_{BLOCK_MAX * W_ROW,
               paired ? BLOCK_MAX * W_ROW / 2 : 0,
               paired ? BLOCK_MAX * W_ROW / 2 : 0,
               mean,
               packed,
               packing,
               8 * BLOCK_MAX},
        total_(0),
        memory_(size_t(threads) * bytes()) {}

  Workspace operator[](int thread) const {
    float* part[7];
    float* next = memory_.as<float>() + thread * total_;
    for (int i = 0; i < 7; ++i) part[i] = next, next += up(sizes_[i], 16);
    return {part[0], part[1], part[2], part[3], part[4], part[5], part[6]};
  }

 private:
  size_t bytes() {
    for (int64_t size : sizes_) total_ += up(size, 16);
    total_ += 16 * 9;  // threads' pieces start in different sets of the cache
    return size_t(total_) * sizeof(float);
  }
  int64_t sizes_[7];
  int64_t total_;
  Scratch memory_;
};

// A pass over the scores of two packed matrices.
struct Pass {
  Layout query, key;
  const int64_t* query_ids;  // (N,) and (M,): pairs with equal ids are left out; or null
  const int64_t* key_ids;
  float scale;  // t
  bool self;    // key is query; j ≤ i is left out of a block paired with itself

  bool bounded(const Block& q, const Block& k) const {
    return std::fabs(scale) * q.bound * k.bound <= BOUND;
  }
  bool diagonal(const Block& q, const Block& k) const { return self && q.first == k.first; }
  // Losses number their pairs in ascending order: then few blocks can hold equal ids, and only
  // those compare them.
  bool ids_meet(const Block& q, const Block& k) const {
    if (!query_ids || !key_ids) return false;
    const auto [q_low, q_high] =
        std::minmax_element(query_ids + q.first, query_ids + q.first + q.rows);
    const auto [k_low, k_high] = std::minmax_element(key_ids + k.first, key_ids + k.first + k.rows);
    return *q_low <= *k_high && *k_low <= *q_high;
  }
};

// Memory that will be needed next, asked for while there is something else to do.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 0;

  Ahead part(int64_t i, int64_t parts) const {
    const int64_t begin = bytes * i / parts, end = bytes * (i + 1) / parts;
    return {at + begin, end - begin};
  }
  void ask() const { prefetch<NEAR>(at, bytes); }
};

// use(strip, first row, rows, first column, end of columns) for every strip of s; `all` keeps them
// all in s, else each overwrites the one before. `ahead` is asked for a little before every tile.
template <bool PAIRED, class Use>
inline void for_strips(const Pass& pass, const Block& q, const Block& k, float* s, bool all,
                       Use use, Ahead ahead = {}) {
  using Words = typename WordsOf<PAIRED>::type;
  const int64_t words = pass.query.words(), end = up(k.rows, NR);
  const int64_t strips = (q.rows + MR - 1) / MR;
  const bool diagonal = pass.diagonal(q, k);
  Mask mask;
  mask.upper = diagonal, mask.columns = k.rows;
  if (pass.ids_meet(q, k))
    mask.row_ids = pass.query_ids + q.first, mask.column_ids = pass.key_ids + k.first;
  // Very long rows: a block of B would not stay in L2, so their scores are summed in parts.
  for (int64_t depth = 0; depth < words; depth += DEPTH_MAX) {
    const bool last = depth + DEPTH_MAX >= words;
    const int64_t count = std::min(DEPTH_MAX, words - depth);
    for (int64_t r = 0; r < q.rows; r += MR) {
      float* strip = s + (all || words > DEPTH_MAX ? r * W_ROW : 0);
      const int64_t begin = diagonal ? r / NR * NR : 0, rows = std::min<int64_t>(MR, q.rows - r);
      for (int64_t c = begin; c < end; c += NR) {
        if (last) ahead.part((r / MR * end + c) / NR, strips * end / NR).ask();
        Finish finish{depth > 0};
        if (PAIRED && last)
          finish.row_factor = q.factor + r, finish.column_factor = k.right_factor + c;
        tile<Words, NR, 1, 2>(rows, q.left + (depth / NR * pass.query.block + r) * NR, NR,
                              pass.query.block * NR, k.right + c * words + depth * NR, count,
                              strip + c, W_ROW, finish);
      }
      if (!last) continue;
      if (mask.needed(end)) leave_out(strip, W_ROW, r, rows, begin, end, mask);
      use(strip, r, rows, begin, end);
    }
  }
}

// A strip's rows: GROUP of them at a time as long as they last, then one by one.
template <class Grouped, class Single>
inline void in_groups(int64_t rows, Grouped grouped, Single single) {
  int64_t r = 0;
  for (; r + GROUP <= rows; r += GROUP) grouped(r);
  for (; r < rows; ++r) single(r);
}

inline Sums block_sums(float* memory) { return {memory, memory + BLOCK_MAX}; }

inline void clear(Sums sums, int64_t count) {
  std::fill_n(sums.maximum, count, NO_MAXIMUM), std::fill_n(sums.sum, count, 0.0f);
}

// total ← total + part; what both were multiplied by goes to `old_factor`, `part_factor` if given.
inline void merge(Sums total, Sums part, int64_t count, float* old_factor = nullptr,
                  float* part_factor = nullptr) {
  for (int64_t c = 0; c < count; c += LANES) {
    const F old = load(total.maximum + c), l = load(part.sum + c);
    // A bounded strip without pairs has maximum 0, which must not push out a low true one.
    const F m = l == 0 ? broadcast(NO_MAXIMUM) : load(part.maximum + c);
    const F top = max(old, m), a = exp(old - top), b = exp(m - top);
    store(total.sum + c, fma(load(total.sum + c), a, l * b));
    store(total.maximum + c, top);
    if (old_factor) store(old_factor + c, a), store(part_factor + c, b);
  }
}

// The block pair's sums into `rows` and, with COLUMNS, `columns` (cleared). KEEP leaves exp(s) in
// the workspace as A of a product.
template <bool PAIRED, bool COLUMNS, bool KEEP>
inline void forward_pair(const Pass& pass, const Block& q, const Block& k, const Workspace& work,
                         Sums rows, Sums columns, Ahead ahead = {}) {
  const bool bounded = pass.bounded(q, k);
  if (COLUMNS) {
    clear(columns, pass.key.block);
    if (bounded) std::fill_n(columns.maximum, pass.key.block, 0.0f);
  }
  for_strips<PAIRED>(
      pass, q, k, work.s, KEEP && !PAIRED,
      [&](float* s, int64_t r0, int64_t count, int64_t begin, int64_t end) {
        const auto sum = [&](auto bound, auto group, int64_t r) {
          sum_rows<group(), bound(), COLUMNS, KEEP>(s + r * W_ROW, W_ROW, begin, end,
                                                    rows + (r0 + r), columns);
        };
        constexpr std::integral_constant<int, GROUP> six{};
        constexpr std::integral_constant<int, 1> one{};
        if (bounded)
          in_groups(
              count, [&](int64_t r) { sum(std::true_type{}, six, r); },
              [&](int64_t r) { sum(std::true_type{}, one, r); });
        else
          in_groups(
              count, [&](int64_t r) { sum(std::false_type{}, six, r); },
              [&](int64_t r) { sum(std::false_type{}, one, r); });
#if defined(__AVX512BF16__)
        if (KEEP && PAIRED)
          pack_rows(s, W_ROW, count, begin, end, k.factor, work.w_rows + r0 * (W_ROW / 2),
                    W_ROW / 2);
#endif
      },
      ahead);
}

// A strip of W in the layouts that times_keys and times_queries read; floats are there already.
template <bool PAIRED>
inline void keep_weights(const Block& q, const Block& k, const Workspace& work, const float* s,
                         int64_t r0, int64_t count, int64_t begin, int64_t end, bool need_query,
                         bool need_key) {
#if defined(__AVX512BF16__)
  if (PAIRED && need_query)
    pack_rows(s, W_ROW, count, begin, end, k.factor, work.w_rows + r0 * (W_ROW / 2), W_ROW / 2);
  if (PAIRED && need_key)
    pack_pairs(s, W_ROW, count, begin, end, q.factor + r0, work.w_pairs + r0 / 2 * W_ROW, W_ROW);
#endif
  (void)q, (void)k, (void)work, (void)s, (void)r0, (void)count, (void)begin, (void)end;
  (void)need_query, (void)need_key;
}

// s ← W for a block pair, in the layouts that the products need.
template <bool PAIRED, bool OF_ROWS, bool OF_COLUMNS>
inline void weights_pair(const Pass& pass, const Block& q, const Block& k, const Workspace& work,
                         Weights rows, Weights columns, bool need_query, bool need_key) {
  const bool bounded = pass.bounded(q, k);
  for_strips<PAIRED>(
      pass, q, k, work.s, !PAIRED,
      [&](float* s, int64_t r0, int64_t count, int64_t begin, int64_t end) {
        const auto weigh_rows = [&](auto bound, auto group, int64_t r) {
          weigh<group(), bound(), OF_ROWS, OF_COLUMNS>(
              s + r * W_ROW, W_ROW, begin, end, rows + (q.first + r0 + r), columns + k.first);
        };
        constexpr std::integral_constant<int, GROUP> six{};
        constexpr std::integral_constant<int, 1> one{};
        if (bounded)
          in_groups(
              count, [&](int64_t r) { weigh_rows(std::true_type{}, six, r); },
              [&](int64_t r) { weigh_rows(std::true_type{}, one, r); });
        else
          in_groups(
              count, [&](int64_t r) { weigh_rows(std::false_type{}, six, r); },
              [&](int64_t r) { weigh_rows(std::false_type{}, one, r); });
        keep_weights<PAIRED>(q, k, work, s, r0, count, begin, end, need_query, need_key);
      });
}

// sums (panels, block, NR) = or += W k̂, from the weights in the workspace.
template <bool PAIRED>
inline void times_keys(const Pass& pass, const Block& q, const Block& k, const Workspace& work,
                       float* sums, bool add) {
  using Words = typename WordsOf<PAIRED>::type;
  constexpr int64_t ROW = PAIRED ? W_ROW / 2 : W_ROW;
  const int64_t per_word = PAIRED ? 2 : 1;
  const bool diagonal = pass.diagonal(q, k);
  multiply<Words, ROW, 1>(PAIRED ? work.w_rows : work.s, k.values, pass.key.block / per_word, sums,
                          pass.query.block, q.rows, pass.key.d, add, [&](int64_t r) {
                            return Range{diagonal ? r / NR * NR / per_word : 0,
                                         (k.rows + per_word - 1) / per_word};
                          });
}

// sums (panels, block, NR) = or += Wᵀ q̂.
template <bool PAIRED>
inline void times_queries(const Pass& pass, const Block& q, const Block& k, const Workspace& work,
                          float* sums, bool add) {
  using Words = typename WordsOf<PAIRED>::type;
  const int64_t per_word = PAIRED ? 2 : 1;
  const bool diagonal = pass.diagonal(q, k);
  multiply<Words, 1, W_ROW>(PAIRED ? work.w_pairs : work.s, q.values, pass.query.block / per_word,
                            sums, pass.key.block, k.rows, pass.query.d, add, [&](int64_t c) {
                              const int64_t end =
                                  diagonal ? std::min<int64_t>(q.rows, c + MR) : q.rows;
                              return Range{0, (end + per_word - 1) / per_word};
                            });
}

}  // namespace fastcl
