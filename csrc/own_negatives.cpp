// Log-sum-exp of each query's similarities to negatives of its own.
//
//   s_nk = t · q_n · k_nk,   lse_n = log Σ_k exp s_nk
//   W_nk = g_n exp(s_nk − lse_n)
//   ∂/∂k_nk = t W_nk q_n,   ∂/∂q_n = t Σ_k W_nk k_nk,   ∂/∂t = Σ_nk W_nk q_n · k_nk
//
// with q and k normalised first where asked, and the gradients through that. The negatives outweigh
// all else: they are read once in each direction and their gradient is written once.
// Plain version: fastcl/reference/own_negatives.py.
// Triton twin: kernels/own_negatives.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "pages.h"
#include "prefetch.h"
#include "scratch.h"
#include "subnormals.h"

namespace fastcl {
namespace {

constexpr float NORM_FLOOR = 1e-12f;
constexpr int64_t PARALLEL = 1 << 15;  // multiply-adds below which one thread is faster

// x (D padded,) = q / max(‖q‖, floor); returns the divisor.
template <class T>
float unit(const T* q, float* x, int64_t d, bool normalize) {
  F squares{};
  for (int64_t j = 0; j < d; j += LANES) {
    const F v = load(q + j, d - j);
    store(x + j, v);
    squares = fma(v, v, squares);
  }
  const float norm = normalize ? std::fmax(std::sqrt(sum(squares)), NORM_FLOOR) : 1.0f;
  for (int64_t j = 0; j < d; j += LANES) store(x + j, load(x + j) / broadcast(norm));
  return norm;
}

struct Row {
  float cosine, norm;  // x · k̂, max(‖k‖, floor)
};

template <class T>
Row row_of(const float* x, const T* k, int64_t d, bool normalize) {
  F dot{}, squares{};
  for (int64_t j = 0; j < d; j += LANES) {
    prefetch<NEAR>(k + j + AHEAD);
    const F v = load(k + j, d - j);
    dot = fma(load(x + j), v, dot), squares = fma(v, v, squares);
  }
  const float norm = normalize ? std::fmax(std::sqrt(sum(squares)), NORM_FLOOR) : 1.0f;
  return {sum(dot) / norm, norm};
}

}  // namespace

void own_negatives_forward(const void* query, const void* negatives, const float* scale, float* lse,
                           int64_t n, int64_t k, int64_t d, bool normalize, int dtype,
                           int threads) {
  with_type(dtype, [&](auto* type) {
    const auto* q = static_cast<decltype(type)>(const_cast<void*>(query));
    const auto* keys = static_cast<decltype(type)>(const_cast<void*>(negatives));
    float* out = lse;  // clang 14 loses what a lambda in a parallel region captures twice
    const float t = *scale;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k * d > PARALLEL)
    for (int64_t i = 0; i < n; ++i) {
      const NoSubnormals fast;
      const Scratch memory(size_t(padded(d) + k) * 4);
      float *x = memory.as<float>(), *s = x + padded(d), top = -INF;
      unit(q + i * d, x, d, normalize);
      for (int64_t c = 0; c < k; ++c) {
        s[c] = t * row_of(x, keys + (i * k + c) * d, d, normalize).cosine;
        top = s[c] > top || s[c] != s[c] ? s[c] : top;
      }
      double total = 0;
      for (int64_t c = 0; c < k; c += LANES)
        total += sum(exp2((load(s + c, k - c, -INF) - top) * LOG2E));
      out[i] = top == -INF ? -INF : float(top + std::log(total));
    }
  });
}

void own_negatives_backward(const float* grad, const void* query, const void* negatives,
                            const float* scale, const float* lse, void* grad_query,
                            void* grad_negatives, float* grad_scale, int64_t n, int64_t k,
                            int64_t d, bool normalize, int dtype, int threads) {
  std::vector<double> products(size_t(n), 0.0);
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    const auto* q = static_cast<T>(const_cast<void*>(query));
    const auto* keys = static_cast<T>(const_cast<void*>(negatives));
    T dq = static_cast<T>(grad_query), dk = static_cast<T>(grad_negatives);
    const float *g = grad, *l = lse;  // as above
    const float t = *scale;
    const int64_t width = padded(d);
    if (dk != nullptr) ask_for_huge_pages(dk, n * k * d * int64_t(sizeof *dk));
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k * d > PARALLEL)
    for (int64_t i = 0; i < n; ++i) {
      const NoSubnormals fast;
      const Scratch memory(size_t(2 * width) * 4);
      float *x = memory.as<float>(), *total = x + width;  // total: Σ_k W k̂
      const float norm = unit(q + i * d, x, d, normalize);
      std::fill_n(total, width, 0.0f);
      double product = 0;
      for (int64_t c = 0; c < k; ++c) {
        const auto* key = keys + (i * k + c) * d;
        const Row row = row_of(x, key, d, normalize);
        const float s = t * row.cosine;
        const float w = s == -INF ? 0.0f : g[i] * std::exp(s - l[i]), share = w / row.norm;
        // Below the floor of the norm k̂ = k / floor: there is no projection.
        const bool projects = normalize && row.norm > NORM_FLOOR;
        const float along = projects ? t * share * row.cosine / row.norm : 0.0f;
        product += double(w) * row.cosine;
        for (int64_t j = 0; j < d; j += LANES) {
          const F v = load(key + j, d - j);
          store(total + j, fma(broadcast(share), v, load(total + j)));
          if (dk != nullptr)
            store(dk + (i * k + c) * d + j,
                  fma(broadcast(-along), v, broadcast(t * share) * load(x + j)), d - j);
        }
      }
      products[size_t(i)] = product;
      if (dq == nullptr) continue;
      F along{};
      for (int64_t j = 0; j < d; j += LANES) along = fma(load(total + j), load(x + j), along);
      const float project = normalize && norm > NORM_FLOOR ? sum(along) : 0.0f;
      for (int64_t j = 0; j < d; j += LANES)
        store(dq + i * d + j,
              (load(total + j) - broadcast(project) * load(x + j)) * broadcast(t / norm), d - j);
    }
  });
  double total = 0;
  for (double product : products) total += product;
  *grad_scale = float(total);
}

}  // namespace fastcl
