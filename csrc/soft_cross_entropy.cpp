// Cross entropy with soft targets.
//
//   s_ik   = t x_ik                          t = 1 / temperature
//   lse_i  = log Σ_k exp s_ik,   m_i = Σ_k y_ik
//   loss_i = Σ_k y_ik (lse_i − s_ik)
//   ∂loss_i/∂x_ik = t (m_i p_ik − y_ik),     p_ik = exp(s_ik − lse_i)
//   ∂loss_i/∂t    = Σ_k x_ik (m_i p_ik − y_ik)
//
// Forward reads each logit once. Rows are cut into pieces of a fixed length, the unit of work of a
// thread, combined in order.
// Plain version: fastcl/reference/soft_cross_entropy.py.
// Triton twin: kernels/soft_cross_entropy.py.
#include <algorithm>
#include <numeric>

#include "ops.h"
#include "pages.h"
#include "scratch.h"
#include "soft_targets.h"
#include "subnormals.h"

namespace fastcl {
namespace {

constexpr int64_t PIECE = 8192;        // logits
constexpr int64_t PARALLEL = 1 << 15;  // logits below which a second thread costs more than it does

// Calls f with null pointers of the two storage types.
template <class Function>
void with_types(int logit_dtype, int target_dtype, Function f) {
  with_type(logit_dtype, [&](auto* x) { with_type(target_dtype, [&](auto* y) { f(x, y); }); });
}

}  // namespace

void soft_cross_entropy_forward(const void* logits, const void* targets, float scale, double share,
                                float* loss, float* lse, float* mass, int64_t n, int64_t k,
                                int dtype, int target_dtype, int threads) {
  const int64_t pieces = std::max<int64_t>(1, (k + PIECE - 1) / PIECE);
  const float scale2 = float(scale * soft::LOG2E_);
  const Scratch memory((sizeof(soft::Sums<double>) * size_t(pieces) + sizeof(double)) * size_t(n));
  auto* part = memory.as<soft::Sums<double>>();                 // (N, pieces)
  auto* losses = reinterpret_cast<double*>(part + n * pieces);  // (N,)
  with_types(dtype, target_dtype, [&](auto* logit, auto* target) {
    const auto* x = static_cast<decltype(logit)>(const_cast<void*>(logits));
    const auto* y = static_cast<decltype(target)>(const_cast<void*>(targets));
#pragma omp parallel num_threads(threads) if (n * k > PARALLEL)
    {
      const NoSubnormals fast;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n * pieces; ++i) {
        const int64_t j = i % pieces * PIECE, at = i / pieces * k + j;
        part[i] = soft::sums_of(x + at, y + at, std::min(k - j, PIECE), scale2);
      }
    }
  });
#pragma omp parallel for num_threads(threads) schedule(static) if (n * pieces > PARALLEL / 8)
  for (int64_t i = 0; i < n; ++i) {
    soft::Sums<double> row = part[i * pieces];
    for (int64_t j = 1; j < pieces; ++j) row = soft::together(row, part[i * pieces + j]);
    const double log2_sum = std::log2(row.exponentials);
    losses[i] = soft::LN2_ * (row.mass * log2_sum - row.products);
    const double exact = soft::LN2_ * (row.top + log2_sum);
    lse[i] = float(exact);
    // Backward needs m exp(s − lse) alone: what rounding adds to lse goes into m.
    mass[i] = float(soft::moderate(lse[i]) ? row.mass * std::exp(lse[i] - exact) : row.mass);
  }
  if (share == 0)
    std::copy_n(losses, n, loss);
  else
    *loss = float(share * std::accumulate(losses, losses + n, 0.0));
}

void soft_cross_entropy_backward(const float* grad, const void* logits, const void* targets,
                                 float scale, double share, const float* lse, const float* mass,
                                 void* grad_logits, float* grad_scale, int64_t n, int64_t k,
                                 int dtype, int target_dtype, int threads) {
  const auto grad_of = [&](int64_t row) { return share == 0 ? grad[row] : float(share * *grad); };
  const int64_t pieces = std::max<int64_t>(1, (k + PIECE - 1) / PIECE);
  const float scale2 = float(scale * soft::LOG2E_);
  const Scratch memory(sizeof(double) * size_t(n * (pieces + 1)));
  auto* part = memory.as<double>();                                    // (N, pieces)
  auto* of_row = reinterpret_cast<soft::Softmax*>(part + n * pieces);  // (N,)
  with_types(dtype, target_dtype, [&](auto* logit, auto* target) {
    using X = decltype(logit);
    const auto* x = static_cast<X>(const_cast<void*>(logits));
    const auto* y = static_cast<decltype(target)>(const_cast<void*>(targets));
    const int64_t bytes = n * k * int64_t(sizeof *x);
    ask_for_huge_pages(grad_logits, bytes);
    X dx = static_cast<X>(grad_logits);
#pragma omp parallel num_threads(threads) if (n * k > PARALLEL)
    {
      const NoSubnormals fast;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        of_row[i] = soft::moderate(lse[i])
                        ? soft::softmax_of(lse[i])
                        : soft::softmax_of(soft::row_sums(x + i * k, y + i * k, k, scale2));
        of_row[i].share *= mass[i];
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n * pieces; ++i) {
        const int64_t row = i / pieces, j = i % pieces * PIECE, at = row * k + j;
        const float g = grad_of(row);
        part[i] = double(g) * soft::gradient(x + at, y + at, std::min(k - j, PIECE), scale2,
                                             of_row[row].top, of_row[row].share, scale * g,
                                             bytes > PAST_CACHES_BYTES, dx + at);
      }
      after_stores_past_caches();
    }
  });
  *grad_scale = float(std::accumulate(part, part + n * pieces, 0.0));
}

}  // namespace fastcl
