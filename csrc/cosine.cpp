// Negative cosine similarity of paired rows.
//
//   c_i    = <p_i, t_i> / (P_i T_i)          P_i = max(|p_i|, ε),  T_i = max(|t_i|, ε)
//   loss_i = −c_i
//   ∂loss_i/∂p_i = −(t_i / T_i − c_i p_i / P_i) / P_i     without the second term where |p_i| < ε
//
// Forward reads each row once; backward reads it twice, the second time from L1.
// Plain version: fastcl/reference/cosine.py. Triton twin: kernels/cosine.py.
#include "ops.h"
#include "pages.h"
#include "prefetch.h"

namespace fastcl {
namespace {

struct Products {
  float pt, pp, tt;
};

template <class T>
Products products(const T* p, const T* t, int64_t d) {
  F pt0{}, pp0{}, tt0{}, pt1{}, pp1{}, tt1{};
  int64_t k = 0;
  for (; k + 2 * LANES <= d; k += 2 * LANES) {
    prefetch<NEAR>(p + k + AHEAD, 2 * LANES), prefetch<NEAR>(t + k + AHEAD, 2 * LANES);
    const F a0 = load(p + k), b0 = load(t + k);
    const F a1 = load(p + k + LANES), b1 = load(t + k + LANES);
    pt0 = fma(a0, b0, pt0), pp0 = fma(a0, a0, pp0), tt0 = fma(b0, b0, tt0);
    pt1 = fma(a1, b1, pt1), pp1 = fma(a1, a1, pp1), tt1 = fma(b1, b1, tt1);
  }
  for (; k < d; k += LANES) {
    const F a = load(p + k, d - k), b = load(t + k, d - k);
    pt0 = fma(a, b, pt0), pp0 = fma(a, a, pp0), tt0 = fma(b, b, tt0);
  }
  return {sum(pt0 + pt1), sum(pp0 + pp1), sum(tt0 + tt1)};
}

// out = x · a + y · b
template <class T>
void combine(const T* x, float a, const T* y, float b, T* out, int64_t d) {
  auto sum_of = [&](F u, F v) { return fma(u, broadcast(a), v * b); };
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) store(out + k, sum_of(load(x + k), load(y + k)));
  if (k < d) store(out + k, sum_of(load(x + k, d - k), load(y + k, d - k)), d - k);
}

}  // namespace

void cosine_forward(const void* prediction, const void* target, float* loss, int64_t n, int64_t d,
                    float eps, int dtype, int threads) {
  with_type(dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(prediction));
    const auto* t = static_cast<decltype(type)>(const_cast<void*>(target));
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > 16384)
    for (int64_t i = 0; i < n; ++i) {
      const Products s = products(p + i * d, t + i * d, d);
      const float P = std::fmax(std::sqrt(s.pp), eps), T = std::fmax(std::sqrt(s.tt), eps);
      loss[i] = -s.pt / P / T;
    }
  });
}

void cosine_backward(const float* grad, const void* prediction, const void* target,
                     void* grad_prediction, void* grad_target, int64_t n, int64_t d, float eps,
                     int dtype, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    const auto* p = static_cast<T>(const_cast<void*>(prediction));
    const auto* t = static_cast<T>(const_cast<void*>(target));
    T dp = static_cast<T>(grad_prediction), dt = static_cast<T>(grad_target);
    for (T grad_x : {dp, dt})
      if (grad_x) ask_for_huge_pages(grad_x, n * d * int64_t(sizeof *grad_x));
#pragma omp parallel for num_threads(threads) schedule(static) if (n * d > 16384)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = i * d;
      const Products s = products(p + row, t + row, d);
      const float np = std::sqrt(s.pp), nt = std::sqrt(s.tt);
      const float P = std::fmax(np, eps), T = std::fmax(nt, eps), c = s.pt / P / T;
      const float g = grad[i];
      if (dp) combine(t + row, -g / P / T, p + row, np < eps ? 0 : g * c / P / P, dp + row, d);
      if (dt) combine(p + row, -g / P / T, t + row, nt < eps ? 0 : g * c / T / T, dt + row, d);
    }
  });
}

}  // namespace fastcl
