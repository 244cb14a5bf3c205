// Cross entropy with soft targets.
//
//   s_ik   = t x_ik                          t = 1 / temperature
//   lse_i  = log Σ_k exp s_ik,   m_i = Σ_k y_ik
//   loss_i = Σ_k y_ik (lse_i − s_ik)
//   ∂loss_i/∂x_ik = t (m_i p_ik − y_ik),     p_ik = exp(s_ik − lse_i)
//   ∂loss_i/∂t    = Σ_k x_ik (m_i p_ik − y_ik)
//
// Forward reads each logit once: every lane of a vector keeps its own maximum and the sums relative
// to it, so that neither a common offset of the logits nor their size costs digits. Rows are cut
// into pieces of a fixed length, the unit of work of a thread, combined in order.
// Plain version: fastcl/reference/soft_cross_entropy.py. Triton twin: kernels/soft_cross_entropy.py.
// Source: online maximum and sum: Milakov & Gimelshein 2018, arXiv:1805.02867.
#include <algorithm>
#include <numeric>

#include "ops.h"
#include "pages.h"
#include "scratch.h"

namespace fastcl {
namespace {

constexpr int64_t PIECE = 8192;        // logits
constexpr int64_t TILE = 8;            // vectors that share one look at the maximum
constexpr int64_t PARALLEL = 1 << 15;  // logits below which a second thread costs more than it does
constexpr float LOWEST = -1e30f;       // below any exponent, and its products stay finite
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

Sums<double> across_lanes(Sums<F> v) {
  v.move(broadcast(max(v.top)));
  return {v.top[0], sum(v.exponentials), sum(v.products), sum(v.mass)};
}

Sums<double> together(Sums<double> a, Sums<double> b) {
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
    for (int64_t r = 0; r < TILE; ++r)
      tile[r] = load(x + j + r * LANES), top = max(top, tile[r] * t);
    total.move(top);
    for (int64_t r = 0; r < TILE; ++r) {
      const F z = fma(tile[r], t, -top), target = load(y + j + r * LANES);
      total.exponentials += exp2(z);
      total.products = fma(target, z, total.products);
      total.mass += target;
    }
  }
  for (; j < k; j += LANES) {
    const F logit = load(x + j, k - j), target = load(y + j, k - j);
    F s = logit * t;
    for (int64_t i = k - j; i < LANES; ++i) s[i] = LOWEST;
    const F top = max(total.top, s);
    total.move(top);
    F z = fma(logit, t, -top);
    for (int64_t i = k - j; i < LANES; ++i) z[i] = LOWEST;
    total.exponentials += exp2(z);
    total.products = fma(target, z, total.products);
    total.mass += target;
  }
  return across_lanes(total);
}

template <class X, class Y>
Sums<double> row_sums(const X* x, const Y* y, int64_t k, float scale) {
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
  auto gradient_of = [&](F logit, F target) {
    const F p = exp2(fma(logit, broadcast(scale2), broadcast(-top)));
    const F r = fma(p, broadcast(share), -target);
    dot = fma(logit, r, dot);  // the lanes beyond K have a logit of zero
    return r * tg;
  };
  int64_t j = 0;
  if constexpr (std::is_same_v<X, float>) {
    if (past_caches) {
      j = std::min(until_aligned(grad), k);
      if (j > 0) store(grad, gradient_of(load(x, j), load(y, j)), j);
      for (; j + LANES <= k; j += LANES)
        store_past_caches(grad + j, gradient_of(load(x + j), load(y + j)));
    }
  }
  for (; j + LANES <= k; j += LANES) store(grad + j, gradient_of(load(x + j), load(y + j)));
  if (j < k) store(grad + j, gradient_of(load(x + j, k - j), load(y + j, k - j)), k - j);
  return sum(dot);
}

// Calls f with null pointers of the two storage types.
template <class Function>
void with_types(int logit_dtype, int target_dtype, Function f) {
  with_type(logit_dtype, [&](auto* x) { with_type(target_dtype, [&](auto* y) { f(x, y); }); });
}

}  // namespace

void soft_cross_entropy_forward(const void* logits, const void* targets, float scale, float* loss,
                                float* lse, float* mass, int64_t n, int64_t k, int dtype,
                                int target_dtype, int threads) {
  const int64_t pieces = std::max<int64_t>(1, (k + PIECE - 1) / PIECE);
  const float scale2 = float(scale * LOG2E_);
  const Scratch memory(sizeof(Sums<double>) * size_t(n * pieces));
  auto* part = memory.as<Sums<double>>();
  with_types(dtype, target_dtype, [&](auto* logit, auto* target) {
    const auto* x = static_cast<decltype(logit)>(const_cast<void*>(logits));
    const auto* y = static_cast<decltype(target)>(const_cast<void*>(targets));
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k > PARALLEL)
    for (int64_t i = 0; i < n * pieces; ++i) {
      const int64_t j = i % pieces * PIECE, at = i / pieces * k + j;
      part[i] = sums_of(x + at, y + at, std::min(k - j, PIECE), scale2);
    }
  });
#pragma omp parallel for num_threads(threads) schedule(static) if (n * pieces > PARALLEL / 8)
  for (int64_t i = 0; i < n; ++i) {
    Sums<double> row = part[i * pieces];
    for (int64_t j = 1; j < pieces; ++j) row = together(row, part[i * pieces + j]);
    const double log2_sum = std::log2(row.exponentials);
    loss[i] = float(LN2_ * (row.mass * log2_sum - row.products));
    lse[i] = float(LN2_ * (row.top + log2_sum));
    mass[i] = float(row.mass);
  }
}

void soft_cross_entropy_backward(const float* grad, const void* logits, const void* targets,
                                 float scale, const float* lse, const float* mass,
                                 void* grad_logits, float* grad_scale, int64_t n, int64_t k,
                                 int dtype, int target_dtype, int threads) {
  const int64_t pieces = std::max<int64_t>(1, (k + PIECE - 1) / PIECE);
  const float scale2 = float(scale * LOG2E_);
  const Scratch memory(sizeof(double) * size_t(n * (pieces + 1)));
  auto* part = memory.as<double>();                       // (N, pieces)
  float *top = memory.as<float>() + 2 * n * pieces, *share = top + n;  // (N,)
  with_types(dtype, target_dtype, [&](auto* logit, auto* target) {
    using X = decltype(logit);
    const auto* x = static_cast<X>(const_cast<void*>(logits));
    const auto* y = static_cast<decltype(target)>(const_cast<void*>(targets));
    const int64_t bytes = n * k * int64_t(sizeof *x);
    ask_for_huge_pages(grad_logits, bytes);
    X dx = static_cast<X>(grad_logits);
#pragma omp parallel num_threads(threads) if (n * k > PARALLEL)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        const double lse2 = lse[i] * LOG2E_;
        top[i] = float(lse2), share[i] = mass[i] * float(std::exp2(top[i] - lse2));
        if (!(std::fabs(lse[i]) < 32)) {  // float32 rounds a large lse by more than p may err
          const Sums<double> row = row_sums(x + i * k, y + i * k, k, scale2);
          top[i] = float(row.top), share[i] = float(mass[i] / row.exponentials);
        }
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n * pieces; ++i) {
        const int64_t row = i / pieces, j = i % pieces * PIECE, at = row * k + j;
        part[i] = double(grad[row]) * gradient(x + at, y + at, std::min(k - j, PIECE), scale2,
                                               top[row], share[row], scale * grad[row],
                                               bytes > PAST_CACHES_BYTES, dx + at);
      }
      after_stores_past_caches();
    }
  });
  *grad_scale = float(std::accumulate(part, part + n * pieces, 0.0));
}

}  // namespace fastcl
