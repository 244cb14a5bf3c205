// Sums of exponentials that keep their largest entry apart, for 1 − p that does not cancel.
//
//   Σ_j exp s_ij = e^maximum_i (top_i + others_i)      top the largest of the entries
//
// of the rows and the columns of a strip at once. min and max of (top, entry) sort each entry in:
// the smaller of the two joins the others.
#pragma once

#include "block_pair.h"

namespace fastcl {

// One of each for a block's rows or columns.
struct Tops {
  float* maximum;
  float* top;
  float* others;
  Tops operator+(int64_t i) const { return {maximum + i, top + i, others + i}; }
};

inline Tops tops_in(float* memory, int64_t count) {
  return {memory, memory + count, memory + 2 * count};
}

inline void clear(Tops tops, int64_t count, float maximum) {
  std::fill_n(tops.maximum, count, maximum);
  std::fill_n(tops.top, count, 0.0f), std::fill_n(tops.others, count, 0.0f);
}

// A NaN stays in `others`.
inline void add_entry(F e, F& top, F& others) {
  others += min(top, e);
  top = max(top, e);
}

// Tops of ROWS rows (written) and of columns (added to); BOUNDED as in strip.h.
template <int ROWS, bool BOUNDED>
inline void top_rows(const float* s, int64_t begin, int64_t end, Tops rows, Tops columns) {
  F m[ROWS], top[ROWS], others[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    m[r] = broadcast(BOUNDED ? 0 : NO_MAXIMUM);
    top[r] = others[r] = F{};
  }
  if constexpr (!BOUNDED) {
    for (int64_t c = begin; c < end; c += LANES) {
      const F old = load(columns.maximum + c);
      F highest = old;
      for (int r = 0; r < ROWS; ++r) {
        const F x = load(s + r * W_ROW + c);
        m[r] = max(m[r], x), highest = max(highest, x);
      }
      const F shrink = exp(old - highest);
      store(columns.maximum + c, highest);
      store(columns.top + c, load(columns.top + c) * shrink);
      store(columns.others + c, load(columns.others + c) * shrink);
    }
    for (int r = 0; r < ROWS; ++r) m[r] = broadcast(max(m[r]));
  }
  for (int64_t c = begin; c < end; c += LANES) {
    const F highest = BOUNDED ? F{} : load(columns.maximum + c);
    F column_top = load(columns.top + c), column_others = load(columns.others + c);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const F x = load(s + r * W_ROW + c);
      const F e = BOUNDED ? exp_bounded(x) : exp(x - m[r]);
      add_entry(e, top[r], others[r]);
      add_entry(BOUNDED ? e : exp(x - highest), column_top, column_others);
    }
    store(columns.top + c, column_top), store(columns.others + c, column_others);
  }
  for (int r = 0; r < ROWS; ++r) {  // over the lanes: the largest once, the rest to the others
    const float largest = max(top[r]);
    const F is_largest = top[r] == largest ? broadcast(1.0f) : F{};
    rows.maximum[r] = m[r][0], rows.top[r] = largest;
    rows.others[r] =
        sum(others[r] + (top[r] == largest ? F{} : top[r])) + (sum(is_largest) - 1) * largest;
  }
}

inline void merge(Tops total, Tops part, int64_t count) {
  for (int64_t c = 0; c < count; c += LANES) {
    const F old = load(total.maximum + c), l = load(part.top + c);
    // A bounded strip without pairs has maximum 0, which must not push out a low true one.
    const F m = l == 0 ? broadcast(NO_MAXIMUM) : load(part.maximum + c);
    const F highest = max(old, m), a = exp(old - highest), b = exp(m - highest);
    F top = load(total.top + c) * a,
      others = fma(load(total.others + c), a, load(part.others + c) * b);
    add_entry(l * b, top, others);
    store(total.maximum + c, highest), store(total.top + c, top), store(total.others + c, others);
  }
}

}  // namespace fastcl
