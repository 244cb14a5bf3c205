// What instance_spread does with a strip of scores, a vector at a time: p and u
// = p / m of the ordinary negatives, whose p is at most ½ or a little above it.
// The letters are those of instance_spread.cpp.
#pragma once

#include "block_pair.h"

namespace fastcl {

// A negative is treated by itself if the share of all others, o, is below this.
// At exactly ½ the rounding of o could take two equal entries for one. So the p
// of the others is at most 1 − ALONE.
constexpr float ALONE = 0.47f;

// −log(1 − u) / u for 0 ≤ u ≤ 1 − ALONE, to one unit in the last place.
inline F log1m_over(F u) {
  F y = broadcast(2.9337547e+00f);
  y = fma(y, u, broadcast(-5.5133848e+00f));
  y = fma(y, u, broadcast(5.1359601e+00f));
  y = fma(y, u, broadcast(-2.4374719e+00f));
  y = fma(y, u, broadcast(9.4438028e-01f));
  y = fma(y, u, broadcast(1.0489452e-02f));
  y = fma(y, u, broadcast(2.1850605e-01f));
  y = fma(y, u, broadcast(2.4875481e-01f));
  y = fma(y, u, broadcast(3.3337447e-01f));
  y = fma(y, u, broadcast(4.9999952e-01f));
  return fma(y, u, broadcast(1.0f));
}

// u = exp(s − shift) · factor, or exp(s) · bounded in BOUNDED strips. A
// negative above its row's limit is treated by itself.
struct Shares {
  float* shift;
  float* factor;
  float* bounded;
  float* limit;
  Shares operator+(int64_t i) const { return {shift + i, factor + i, bounded + i, limit + i}; }
};

// Σ −log(1 − u) and Σ u / (1 − u) over the ordinary negatives of ROWS rows
// (written) and of columns (added to).
struct LogSums {
  float* logs;
  float* ratios;
  LogSums operator+(int64_t i) const { return {logs + i, ratios + i}; }
};

template <int ROWS, bool BOUNDED, bool UNIT>
inline void log_rows(const float* s, int64_t begin, int64_t end, Shares of_rows, Shares of_columns,
                     LogSums rows, LogSums columns) {
  F logs[ROWS], ratios[ROWS];
  for (int r = 0; r < ROWS; ++r) logs[r] = ratios[r] = F{};
  const auto add = [&](F u, F& log_sum, F& ratio_sum) {
    if constexpr (UNIT) {
      log_sum = fma(u, log1m_over(u), log_sum);
    } else {
      for (int i = 0; i < LANES; ++i) log_sum[i] -= std::log1p(-u[i]);
    }
    ratio_sum += u / (1.0f - u);
  };
  for (int64_t c = begin; c < end; c += LANES) {
    const F factor = load((BOUNDED ? of_columns.bounded : of_columns.factor) + c);
    const F shift = load(of_columns.shift + c), limit = load(of_columns.limit + c);
    F column_logs = load(columns.logs + c), column_ratios = load(columns.ratios + c);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const F x = load(s + r * W_ROW + c);
      const F e = BOUNDED ? exp_bounded(x) : exp(x - of_rows.shift[r]);
      const F u = e * (BOUNDED ? of_rows.bounded[r] : of_rows.factor[r]);
      const F v = (BOUNDED ? e : exp(x - shift)) * factor;
      add(x > of_rows.limit[r] ? F{} : u, logs[r], ratios[r]);
      add(x > limit ? F{} : v, column_logs, column_ratios);
    }
    store(columns.logs + c, column_logs), store(columns.ratios + c, column_ratios);
  }
  for (int r = 0; r < ROWS; ++r) rows.logs[r] = sum(logs[r]), rows.ratios[r] = sum(ratios[r]);
}

// W = g G = u (slope + weight / (1 − κ u)) on an ordinary negative, which u is
// here the share of in κ D. κ is 1, but 1 / R in a row whose negative has a
// large R: p and R may be out of range where p R, which belongs to the weight,
// is not.
struct Slopes {
  const float* weight;  // κ m g
  const float* slope;   // κ m g (1 − m B)
  const float* minus;   // −κ
  Slopes operator+(int64_t i) const { return {weight + i, slope + i, minus + i}; }
};

// of_rows ← g_r G_rc and, if DETACH, of_columns ← g_c G_cr; else of_rows ←
// their sum. of_rows may be s.
template <bool BOUNDED, bool DETACH>
inline void weigh_row(const float* s, int64_t begin, int64_t end, Shares row, Shares columns,
                      Slopes row_slope, Slopes column_slopes, float* of_rows, float* of_columns) {
  const F one = broadcast(1.0f);
  const F row_factor = broadcast(BOUNDED ? row.bounded[0] : row.factor[0]);
  const F row_shift = broadcast(row.shift[0]), row_minus = broadcast(row_slope.minus[0]);
  const F g = broadcast(row_slope.weight[0]), slope = broadcast(row_slope.slope[0]);
  for (int64_t c = begin; c < end; c += LANES) {
    const F x = load(s + c);
    const F factor = load((BOUNDED ? columns.bounded : columns.factor) + c);
    const F e = BOUNDED ? exp_bounded(x) : exp(x - row_shift);
    const F u = e * row_factor;
    const F v = (BOUNDED ? e : exp(x - load(columns.shift + c))) * factor;
    const F w = u * (slope + g / fma(u, row_minus, one));
    const F h = v * (load(column_slopes.slope + c) +
                     load(column_slopes.weight + c) / fma(v, load(column_slopes.minus + c), one));
    if (DETACH)
      store(of_rows + c, w), store(of_columns + c, h);
    else
      store(of_rows + c, w + h);
  }
}

}  // namespace fastcl
