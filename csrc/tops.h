// Sums of exponentials that keep their largest entry apart, for 1 − p that does not cancel.
//
//   Σ_j exp s_ij = e^reference_i top_i + e^others_reference_i others_i      top: the largest entry
//
// of the rows and the columns of a strip at once. The others have a reference of their own, so that
// they are not lost however far below the largest they lie.
#pragma once

#include "block_pair.h"

namespace fastcl {

// One of each for a block's rows or columns.
struct Tops {
  float* reference;
  float* top;
  float* others_reference;
  float* others;
  Tops operator+(int64_t i) const {
    return {reference + i, top + i, others_reference + i, others + i};
  }
};

inline Tops tops_in(float* memory, int64_t count) {
  return {memory, memory + count, memory + 2 * count, memory + 3 * count};
}

inline void clear(Tops tops, int64_t count, float reference) {
  std::fill_n(tops.reference, count, reference), std::fill_n(tops.top, count, 0.0f);
  std::fill_n(tops.others_reference, count, reference), std::fill_n(tops.others, count, 0.0f);
}

// BOUNDED strips: both references are 0. min and max of (top, entry) sort each entry in: the
// smaller of the two joins the others. A NaN stays in `others`.
inline void add_entry(F e, F& top, F& others) {
  others += min(top, e);
  top = max(top, e);
}

// Other strips: the largest two scores are found first, and then Σ min(exp(s − second), 1) is the
// others and 1 for the largest.
inline void add_score(F x, F& first, F& second) {
  second = max(second, min(first, x));
  first = max(first, x);
}
inline F exp_up_to_1(F x) { return min(broadcast(1.0f), exp(x)); }

// Tops of ROWS rows (written) and of columns (added to); BOUNDED as in strip.h.
template <int ROWS, bool BOUNDED>
inline void top_rows(const float* s, int64_t begin, int64_t end, Tops rows, Tops columns) {
  F first[ROWS], second[ROWS], others[ROWS];  // BOUNDED: first is the top's exponential
  for (int r = 0; r < ROWS; ++r) {
    first[r] = second[r] = broadcast(BOUNDED ? 0 : NO_MAXIMUM);
    others[r] = F{};
  }
  if constexpr (!BOUNDED) {
    for (int64_t c = begin; c < end; c += LANES) {
      const F old_first = load(columns.reference + c),
              old_second = load(columns.others_reference + c);
      F high = old_first, low = old_second;
      for (int r = 0; r < ROWS; ++r) {
        const F x = load(s + r * W_ROW + c);
        add_score(x, first[r], second[r]), add_score(x, high, low);
      }
      // What was the largest may be one of the others now.
      store(columns.others + c, fma(load(columns.others + c), exp(old_second - low),
                                    load(columns.top + c) * exp_up_to_1(old_first - low)));
      store(columns.reference + c, high), store(columns.others_reference + c, low);
    }
    for (int r = 0; r < ROWS; ++r) {  // the largest two of the lanes'
      const float highest = max(first[r]);
      const F is_highest = first[r] == highest ? broadcast(1.0f) : F{};
      const F rest = first[r] == highest ? second[r] : first[r];
      second[r] = broadcast(sum(is_highest) > 1 ? highest : max(rest));
      first[r] = broadcast(highest);
    }
  }
  for (int64_t c = begin; c < end; c += LANES) {
    const F low = BOUNDED ? F{} : load(columns.others_reference + c);
    F column_top = load(columns.top + c), column_others = load(columns.others + c);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const F x = load(s + r * W_ROW + c);
      if constexpr (BOUNDED) {
        const F e = exp_bounded(x);
        add_entry(e, first[r], others[r]);
        add_entry(e, column_top, column_others);
      } else {
        others[r] += exp_up_to_1(x - second[r]);
        column_others += exp_up_to_1(x - low);
      }
    }
    if constexpr (!BOUNDED) {
      column_top = load(columns.reference + c) > NO_MAXIMUM ? broadcast(1.0f) : F{};
      column_others -= column_top;
    }
    store(columns.top + c, column_top), store(columns.others + c, column_others);
  }
  for (int r = 0; r < ROWS; ++r) {
    const float highest = max(first[r]);
    if constexpr (BOUNDED) {  // over the lanes: the largest once, the rest to the others
      const F is_highest = first[r] == highest ? broadcast(1.0f) : F{};
      rows.reference[r] = rows.others_reference[r] = 0, rows.top[r] = highest;
      rows.others[r] =
          sum(others[r] + (first[r] == highest ? F{} : first[r])) + (sum(is_highest) - 1) * highest;
    } else {
      rows.reference[r] = highest, rows.top[r] = highest > NO_MAXIMUM;
      rows.others_reference[r] = second[r][0], rows.others[r] = sum(others[r]) - rows.top[r];
    }
  }
}

inline void merge(Tops total, Tops part, int64_t count) {
  for (int64_t c = 0; c < count; c += LANES) {
    const F none = broadcast(NO_MAXIMUM);
    // A bounded strip without pairs has reference 0, which must not push out a low true one.
    const F x = load(total.top + c), y = load(part.top + c), o = load(part.others + c);
    const F x_at = load(total.reference + c), y_at = y == 0 ? none : load(part.reference + c);
    const F old = load(total.others_reference + c);
    const F new_ = o == 0 ? none : load(part.others_reference + c);
    // The smaller of the two largest joins the others.
    const F high = max(x_at, y_at);
    const I stays = x * exp(x_at - high) > y * exp(y_at - high);
    const F smaller = stays ? y : x, smaller_at = stays ? y_at : x_at;
    const F low = max(max(old, new_), smaller_at);
    store(total.top + c, stays ? x : y), store(total.reference + c, stays ? x_at : y_at);
    store(total.others + c, load(total.others + c) * exp(old - low) + o * exp(new_ - low) +
                                smaller * exp(smaller_at - low));
    store(total.others_reference + c, low);
  }
}

}  // namespace fastcl
