// What happens to a strip of scores while it is in L1: masks, exponentials, sums, weights.
//
// A strip is up to MR rows of s = t · q̂·k̂, `row` floats apart, columns [begin, end), whole
// vectors.
// BOUNDED strips are known to have |s| ≤ BOUND: exp(s) needs no maximum, one exponential serves
// rows and columns, and sums of 10^9 terms stay in float's range. Otherwise rows and columns each
// keep a maximum of their own, so nothing that matters can vanish.
#pragma once

#include <cfloat>

#include "gemm.h"

namespace fastcl {

constexpr float BOUND = 64.0f;              // e^64 · 10^10 terms and e^-64 are within float's e^±87
constexpr float LEFT_OUT = -FLT_MAX / 2;    // a score that is not there
constexpr float NO_MAXIMUM = -FLT_MAX / 4;  // above LEFT_OUT, so that exp(LEFT_OUT − it) is 0
constexpr int GROUP = 6;  // rows of one pass: their sums and exponentials fit in registers

// Not exp2 of scores in base 2: lse is handed back in base e, and converting it forth and back
// would cost |s| · 2^-24 in every probability. The difference s − lse is exact where it matters.
inline F exp(F x) { return exp2(x * LOG2E); }
inline F exp_bounded(F x) { return exp2_bounded(x * LOG2E); }

// Where scores are left out of a block pair.
struct Mask {
  bool upper = false;                // j ≤ i, in a block paired with itself
  const int64_t* row_ids = nullptr;  // (rows,) equal ids, or null
  const int64_t* column_ids = nullptr;
  int64_t columns = 0;  // from here on there are none

  bool needed(int64_t end) const { return upper || row_ids || columns < end; }
};

inline void leave_out(float* s, int64_t row, int64_t first_row, int64_t rows, int64_t begin,
                      int64_t end, const Mask& mask) {
  const int64_t last = std::min(end, mask.columns);
  for (int64_t r = 0; r < rows; ++r, s += row) {
    const int64_t i = first_row + r;
    if (mask.row_ids) {
      const int64_t id = mask.row_ids[i];
      for (int64_t c = begin; c < last; ++c) s[c] = mask.column_ids[c] == id ? LEFT_OUT : s[c];
    }
    if (mask.upper)
      for (int64_t c = begin; c < std::min(end, i + 1); ++c) s[c] = LEFT_OUT;
    for (int64_t c = std::max(begin, mask.columns); c < end; ++c) s[c] = LEFT_OUT;
  }
}

// The sums of a block's rows or columns: Σ exp(s) = sum · e^maximum.
struct Sums {
  float* maximum;
  float* sum;
  Sums operator+(int64_t i) const { return {maximum + i, sum + i}; }
};

// Row sums of ROWS rows (written) and column sums (added to); KEEP writes exp(s − maximum_i) over
// s.
template <int ROWS, bool BOUNDED, bool COLUMNS, bool KEEP>
inline void sum_rows(float* s, int64_t row, int64_t begin, int64_t end, Sums rows, Sums columns) {
  F m[ROWS], l[ROWS];
  for (int r = 0; r < ROWS; ++r) m[r] = broadcast(BOUNDED ? 0 : NO_MAXIMUM), l[r] = F{};
  if constexpr (!BOUNDED) {
    for (int64_t c = begin; c < end; c += LANES) {
      F top = COLUMNS ? load(columns.maximum + c) : F{};
      const F old = top;
      for (int r = 0; r < ROWS; ++r) {
        const F x = load(s + r * row + c);
        m[r] = max(m[r], x);
        if (COLUMNS) top = max(top, x);
      }
      if (COLUMNS) {
        store(columns.sum + c, load(columns.sum + c) * exp(old - top));
        store(columns.maximum + c, top);
      }
    }
    for (int r = 0; r < ROWS; ++r) m[r] = broadcast(max(m[r]));
  }
  for (int64_t c = begin; c < end; c += LANES) {
    const F top = COLUMNS && !BOUNDED ? load(columns.maximum + c) : F{};
    F total{};
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const F x = load(s + r * row + c);
      const F e = BOUNDED ? exp_bounded(x) : exp(x - m[r]);
      l[r] += e;
      if (KEEP) store(s + r * row + c, e);
      if (COLUMNS) total += BOUNDED ? e : exp(x - top);
    }
    if (COLUMNS) store(columns.sum + c, load(columns.sum + c) + total);
  }
  for (int r = 0; r < ROWS; ++r) rows.maximum[r] = m[r][0], rows.sum[r] = sum(l[r]);
}

// One side's part of the weights: W_ij = weight · exp(s_ij − shift), with e^-shift folded into
// `bounded` for BOUNDED strips.
struct Weights {
  const float* weight;
  const float* shift;
  const float* bounded;
  Weights operator+(int64_t i) const { return {weight + i, shift + i, bounded + i}; }
};

// s ← W, the sum of the rows' part and the columns' part.
template <int ROWS, bool BOUNDED, bool OF_ROWS, bool OF_COLUMNS>
inline void weigh(float* s, int64_t row, int64_t begin, int64_t end, Weights rows,
                  Weights columns) {
  for (int64_t c = begin; c < end; c += LANES) {
    const F h = OF_COLUMNS ? load((BOUNDED ? columns.bounded : columns.weight) + c) : F{};
    const F shift = OF_COLUMNS && !BOUNDED ? load(columns.shift + c) : F{};
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const F x = load(s + r * row + c);
      F w;
      if constexpr (BOUNDED) {
        const F e = exp_bounded(x);
        w = OF_ROWS ? e * (broadcast(rows.bounded[r]) + h) : e * h;
      } else {
        w = OF_ROWS ? broadcast(rows.weight[r]) * exp(x - rows.shift[r]) : F{};
        if (OF_COLUMNS) w = fma(h, exp(x - shift), w);
      }
      store(s + r * row + c, w);
    }
  }
}

#if defined(__AVX512BF16__)
inline __m256bh to_bfloat16(F x) { return _mm512_cvtneps_pbh(__m512(x)); }

// W as A of W·K: rows of bfloat16, each column times its key's factor.
inline void pack_rows(const float* s, int64_t row, int64_t rows, int64_t begin, int64_t end,
                      const float* column_factor, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = begin; c < end; c += LANES) {
      const __m256bh w = to_bfloat16(load(s + r * row + c) * load(column_factor + c));
      std::memcpy(reinterpret_cast<char*>(to + r * to_row) + c * 2, &w, sizeof w);
    }
}

// W as A of Wᵀ·Q: pairs of rows side by side, each row times its query's factor.
inline void pack_pairs(const float* s, int64_t row, int64_t rows, int64_t begin, int64_t end,
                       const float* row_factor, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += 2, to += to_row)
    for (int64_t c = begin; c < end; c += LANES) {
      const F none{};
      const F even = load(s + r * row + c) * row_factor[r];
      const F odd = r + 1 < rows ? load(s + (r + 1) * row + c) * row_factor[r + 1] : none;
      const __m512i low = _mm512_cvtepu16_epi32(bit_cast<__m256i>(to_bfloat16(even)));
      const __m512i high = _mm512_cvtepu16_epi32(bit_cast<__m256i>(to_bfloat16(odd)));
      store(to + c, F(_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))));
    }
}
#endif

}  // namespace fastcl
