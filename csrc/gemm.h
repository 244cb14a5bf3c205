// The matrix products of the similarity kernels: a tile of MR rows and NR columns of C in
// registers.
//
//   C_ij = Σ_k A(i, k) B(k, j)          A(i, k) = a[i · ROW + k · STEP],  B(k, j) = b[k · NR + j]
//
// Each k loads B's row as two vectors and broadcasts MR words of A: with 32 registers 24
// multiply-adds for 14 loads, and no accumulator leaves its register. Measured at 98 % of the
// multiply-add peak.
// A and B are words of 32 bits: one float, or two bfloat16 that are neighbours along k.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastcl {

constexpr int NR = 2 * LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;  // 24 accumulators, 2 of B, 1 or 2 of A: 32 registers
#else
constexpr int MR = 6;  // 12 accumulators: 16 registers
#endif

// c + a·b, word by word.
struct FloatWords {
  static F multiply_add(F a, F b, F c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
struct BFloat16Pairs {
  static F multiply_add(F a, F b, F c) {
    return F(_mm512_dpbf16_ps(__m512(c), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
};
#endif

// How a tile of C ends: C = AB, C += AB, or C = (C + AB) · row_factor_i · column_factor_j.
struct Finish {
  bool add;
  const float* row_factor = nullptr;
  const float* column_factor = nullptr;
};

// A's words come in chunks of `chunk` along k; from one chunk to the next a advances by `jump`.
template <class Words, int64_t ROW, int64_t STEP, int VECTORS, int ROWS>
inline void tile_of(const float* a, int64_t chunk, int64_t jump, const float* b, int64_t k_end,
                    float* c, int64_t c_row, Finish finish) {
  F acc[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) acc[i][v] = F{};
  if (finish.add)  // C comes from beyond L2 when rows are long; it has the whole loop to arrive
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(c + i * c_row + v * LANES, 1);
  for (int64_t k0 = 0; k0 < k_end; k0 += chunk, a += jump) {
    const int64_t count = std::min(chunk, k_end - k0);
    const float* word = a;
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, word += STEP, b += NR) {
      F row[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * LANES);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        const F x = broadcast(word[i * ROW]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = Words::multiply_add(x, row[v], acc[i][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* out = c + i * c_row + v * LANES;
      F x = acc[i][v];
      if (finish.add) x += load(out);
      if (finish.row_factor)
        x *= broadcast(finish.row_factor[i]) * load(finish.column_factor + v * LANES);
      store(out, x);
    }
}

// A tile that holds `rows` rows: a third of the registers, two, or all of them.
template <class Words, int64_t ROW, int64_t STEP, int VECTORS, class... Arguments>
inline void tile(int64_t rows, Arguments... arguments) {
  if (rows > 2 * MR / 3)
    tile_of<Words, ROW, STEP, VECTORS, MR>(arguments...);
  else if (rows > MR / 3)
    tile_of<Words, ROW, STEP, VECTORS, 2 * MR / 3>(arguments...);
  else
    tile_of<Words, ROW, STEP, VECTORS, MR / 3>(arguments...);
}

// The part [begin, end) of the summed dimension that a strip of rows needs, in words.
struct Range {
  int64_t begin, end;
};

// C (panels, c_rows, NR) = or += A B for `rows` rows and `columns` columns, B (panels, b_rows, NR).
// `range(r)` gives each strip's part of k; the others are known to be zero.
template <class Words, int64_t ROW, int64_t STEP, class RangeOf>
inline void multiply(const float* a, const float* b, int64_t b_rows, float* c, int64_t c_rows,
                     int64_t rows, int64_t columns, bool add, RangeOf range) {
  constexpr int64_t DEPTH = 192;  // rows of B at a time: 24 KB, half of L1, while strips of A pass
  int64_t k_end = 0;
  for (int64_t r = 0; r < rows; r += MR) k_end = std::max(k_end, range(r).end);
  for (int64_t panel = 0; panel * NR < columns; ++panel)
    for (int64_t k0 = 0; k0 < k_end; k0 += DEPTH)
      for (int64_t r = 0; r < rows; r += MR) {
        const Range whole = range(r);
        const int64_t begin = std::max(whole.begin, k0), end = std::min(whole.end, k0 + DEPTH);
        if (begin >= end) continue;
        const float* strip = a + r * ROW + begin * STEP;
        const float* values = b + (panel * b_rows + begin) * NR;
        float* out = c + (panel * c_rows + r) * NR;
        const Finish finish{add || begin > whole.begin};
        if (columns - panel * NR > LANES)
          tile<Words, ROW, STEP, 2>(rows - r, strip, DEPTH, 0, values, end - begin, out, NR,
                                    finish);
        else
          tile<Words, ROW, STEP, 1>(rows - r, strip, DEPTH, 0, values, end - begin, out, NR,
                                    finish);
      }
}

}  // namespace fastcl
