// A row of logits against a row of targets: the sums of a forward pass, the gradient of a backward.
//
// Every lane of a vector keeps its own maximum and the sums relative to it, so that neither a
// common offset of the logits nor their size costs digits.
// Source: online maximum and sum: Milakov & Gimelshein 2018, arXiv:1805.02867.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pages.h"
#include "prefetch.h"
#include "simd.h"

namespace fastcl::soft {

constexpr int64_t TILE = 8;       // vectors that share one look at the maximum
constexpr float LOWEST = -1e30f;  // below any exponent, and its products stay finite
constexpr double LOG2E_ = 1.44269504088896340736, LN2_ = 0.69314718055994530942;

// Sums over some k relative to the maximum of x: Σ 2^(x−top), Σ y (x − top), Σ y; x = s log2 e.
template <class V>
struct Sums {
  V top, exponentials, products, mass;

  // The same sums relative to another maximum.
  void move(V to) {
    const V shift = top - to;
    exponentials *= power(shift);
    products += mass * shift;
    top = to;
  }
  static F power(F x) { return exp2(x); }
  static double power(double x) { return std::exp2(x); }
};

inline Sums<double> across_lanes(Sums<F> v) {
  v.move(broadcast(max(v.top)));
  return {v.top[0], sum(v.exponentials), sum(v.products), sum(v.mass)};
}

inline Sums<double> together(Sums<double> a, Sums<double> b) {
  const double top = a.top > b.top ? a.top : b.top;
  a.move(top), b.move(top);
  return {top, a.exponentials + b.exponentials, a.products + b.products, a.mass + b.mass};
}

template <class X, class Y>
Sums<double> sums_of(const X* x, const Y* y, int64_t k, float scale) {
  const F t = broadcast(scale);
  Sums<F> total{broadcast(LOWEST), F{}, F{}, F{}};
  int64_t j = 0;
  for (; j + TILE * LANES <= k; j += TILE * LANES) {
    F tile[TILE], top = total.top;
    for (int64_t r = 0; r < TILE; ++r) {
      prefetch<CLOSE>(x + j + r * LANES + AHEAD), prefetch<CLOSE>(y + j + r * LANES + AHEAD);
      tile[r] = load(x + j + r * LANES), top = max(top, tile[r] * t);
    }
    total.move(top);
    F exponentials{}, mass{};  // of the tile: a narrow vector's long chain of sums would drift
    for (int64_t r = 0; r < TILE; ++r) {
      const F z = fma_once(tile[r], t, -top), target = load(y + j + r * LANES);
      exponentials += exp2(z);
      total.products = fma(target, z, total.products);
      mass += target;
    }
    total.exponentials += exponentials, total.mass += mass;
  }
  for (; j < k; j += LANES) {
    const F logit = load(x + j, k - j), target = load(y + j, k - j);
    F s = logit * t;
    for (int64_t i = k - j; i < LANES; ++i) s[i] = LOWEST;
    const F top = max(total.top, s);
    total.move(top);
    F z = fma_once(logit, t, -top);
    for (int64_t i = k - j; i < LANES; ++i) z[i] = LOWEST;
    total.exponentials += exp2(z);
    total.products = fma(target, z, total.products);
    total.mass += target;
  }
  return across_lanes(total);
}

template <class X, class Y>
Sums<double> row_sums(const X* x, const Y* y, int64_t k, float scale) {
  constexpr int64_t PIECE = 8192;
  Sums<double> total = sums_of(x, y, std::min(k, PIECE), scale);
  for (int64_t j = PIECE; j < k; j += PIECE)
    total = together(total, sums_of(x + j, y + j, std::min(k - j, PIECE), scale));
  return total;
}

// grad x_k = t g (m p_k − y_k), p_k = 2^(x_k t log2 e − top) share; returns Σ_k x_k (m p_k − y_k).
template <class X, class Y>
float gradient(const X* x, const Y* y, int64_t k, float scale2, float top, float share, float tg,
               bool past_caches, X* grad) {
  F dot{};
  auto gradient_of = [&](F logit, F target, int64_t count = LANES) {
    const F p = exp2(fma_once(logit, broadcast(scale2), broadcast(-top)));
    F r = fma(p, broadcast(share), -target);
    for (int64_t lane = count; lane < LANES; ++lane) r[lane] = 0;
    dot = fma(logit, r, dot);
    return r * tg;
  };
  int64_t j = 0;
  if constexpr (std::is_same_v<X, float>) {
    if (past_caches) {
      j = std::min(until_aligned(grad), k);
      if (j > 0) store(grad, gradient_of(load(x, j), load(y, j), j), j);
      for (; j + LANES <= k; j += LANES)
        store_past_caches(grad + j, gradient_of(load(x + j), load(y + j)));
    }
  }
  for (; j + LANES <= k; j += LANES) store(grad + j, gradient_of(load(x + j), load(y + j)));
  if (j < k) store(grad + j, gradient_of(load(x + j, k - j), load(y + j, k - j), k - j), k - j);
  return sum(dot);
}

// A row's probabilities: exp2(s − top) · share.
struct Softmax {
  float top, share;
};

inline Softmax softmax_of(const Sums<double>& row) {
  return {float(row.top), float(std::exp2(float(row.top) - row.top) / row.exponentials)};
}

// From the row's log-sum-exp.
inline Softmax softmax_of(float lse) {
  const double lse2 = lse * LOG2E_;
  return {float(lse2), float(std::exp2(float(lse2) - lse2))};
}

// The same; where float32 rounds the log-sum-exp by more than p may err, from `sums()`.
template <class RowSums>
inline Softmax softmax_of(float lse, RowSums sums) {
  return std::fabs(lse) < 32 ? softmax_of(lse) : softmax_of(sums());
}

// A log-sum-exp that is rounded by less than 1/16, so that e^rounding is about 1.
inline bool moderate(float lse) { return std::fabs(lse) < 0x1p20f; }

}  // namespace fastcl::soft
