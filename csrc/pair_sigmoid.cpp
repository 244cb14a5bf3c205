// SigLIP's pairwise sigmoid loss; the matrix of pairs is never stored.
//
//   s_ij   = t · x̂_i·ŷ_j + b,   z_ij = 1 on the diagonal, −1 off it
//   loss_i = Σ_j softplus(−z_ij s_ij)
//   W_ij   = −g_i z_ij σ(−z_ij s_ij)
//   ∂/∂x̂_i = t Σ_j W_ij ŷ_j,  ∂/∂ŷ_j = t Σ_i W_ij x̂_i,  ∂/∂t = Σ_ij W_ij x̂_i·ŷ_j,
//   ∂/∂b = Σ_ij W_ij
//
// W needs no statistics of the row, so loss and gradients come from one pass: three matrix products
// in all. Memory O(N·D); the same bits for any number of threads.
// Plain version: fastcl/reference/pair_sigmoid.py. Triton twin: kernels/pair_sigmoid.py.
#include "matrix.h"

namespace fastcl {
namespace {

// log(1 + e) / e for 0 ≤ e ≤ 1, to one unit in the last place.
inline F log1p_over(F e) {
  F y = broadcast(2.0302420e-3f);
  y = fma(y, e, broadcast(-1.3407534e-2f));
  y = fma(y, e, broadcast(4.1478239e-2f));
  y = fma(y, e, broadcast(-8.2441770e-2f));
  y = fma(y, e, broadcast(1.2418438e-1f));
  y = fma(y, e, broadcast(-1.6105692e-1f));
  y = fma(y, e, broadcast(1.9890748e-1f));
  y = fma(y, e, broadcast(-2.4987271e-1f));
  y = fma(y, e, broadcast(3.3332560e-1f));
  y = fma(y, e, broadcast(-4.9999982e-1f));
  return fma(y, e, broadcast(1.0f));
}

struct SoftPlus {
  F value, slope;  // softplus(x) and σ(x)
};

inline SoftPlus softplus(F x) {
  const F size = max(x, -x), e = exp(-size), share = 1.0f / (1.0f + e);
  return {fma(e, log1p_over(e), max(F{}, x)), x >= 0.0f ? share : e * share};
}

struct Problem {
  Layout layout;
  float scale, bias;
  const float* grad;  // (N,) or null: 1
  bool need_image, need_text;
};

// The block pair's losses and weights: row sums of both into `loss` and `weight` (block,).
template <bool PAIRED>
void pair_weights(const Problem& problem, const Pass& pass, const Block& q, const Block& k,
                  const Workspace& work, float* loss, float* weight) {
  const bool need = problem.need_image || problem.need_text;
  for_strips<PAIRED>(
      pass, q, k, work.s, need && !PAIRED,
      [&](float* s, int64_t r0, int64_t count, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < count; ++r) {
          float* row = s + r * W_ROW;
          const int64_t own = q.first + r0 + r - k.first;  // the pair's own column, if it is here
          const bool here = own >= 0 && own < k.rows;
          const F bias = broadcast(problem.bias);
          const F g = broadcast(problem.grad ? problem.grad[q.first + r0 + r] : 1.0f);
          float own_slope = 0;
          if (here) {  // z = 1: the same function of −s
            row[own] = -(row[own] + problem.bias) - problem.bias;
            own_slope = softplus(load(row + own, 1) + bias).slope[0];
          }
          F losses{}, weights{};
          for (int64_t c = begin; c < end; c += LANES) {
            const SoftPlus at = softplus(load(row + c) + bias);
            losses += at.value;
            weights += at.slope;
            store(row + c, at.slope * g);
          }
          loss[r0 + r] = sum(losses), weight[r0 + r] = sum(weights) - 2 * own_slope;
          if (here) row[own] = -row[own];
        }
        keep_weights<PAIRED>(q, k, work, s, r0, count, begin, end, problem.need_image,
                             problem.need_text);
      });
}

template <class T>
void run(const Problem& problem, const T* image, const T* text, float* loss, T* grad_image,
         T* grad_text, float* grad_scale, float* grad_bias, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Layout& layout = problem.layout;
  const Pass pass{layout, layout, nullptr, nullptr, problem.scale, false};
  const Rectangle rectangle{layout.blocks(), layout.blocks()};
  const bool need_image = problem.need_image, need_text = problem.need_text;
  const Matrix<T> x(layout, need_text ? LEFT | VALUES : LEFT, image, 0, threads);
  const Matrix<T> y(layout, need_image ? RIGHT | VALUES : RIGHT, text, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const int64_t size = layout.sums_size();
  const Scratch dx(size_t(need_image ? layout.blocks() * size : 0) * 4);
  const Scratch dy(size_t(need_text ? layout.blocks() * size : 0) * 4);
  std::vector<double> losses(size_t(layout.n), 0.0), weights(size_t(layout.n), 0.0);
  Turns row_turns(layout.blocks()), column_turns(layout.blocks());
  in_order(rectangle.tasks(), threads, [&](int64_t task, int thread) {
    const BlockPair pair = rectangle.pair(task);
    const Workspace work = workspaces[thread];
    const Block &q = x[pair.i], &k = y[pair.j];
    float *loss_part = work.sums, *weight_part = work.sums + BLOCK_MAX;
    pair_weights<PAIRED>(problem, pass, q, k, work, loss_part, weight_part);
    row_turns.wait(pair.i, pair.turn_i);
    for (int64_t r = 0; r < q.rows; ++r) {
      losses[size_t(q.first + r)] += loss_part[r];
      weights[size_t(q.first + r)] += weight_part[r];
    }
    if (need_image)
      times_keys<PAIRED>(pass, q, k, work, dx.as<float>() + pair.i * size, pair.turn_i > 0);
    row_turns.next(pair.i);
    if (!need_text) return;
    column_turns.wait(pair.j, pair.turn_j);
    times_queries<PAIRED>(pass, q, k, work, dy.as<float>() + pair.j * size, pair.turn_j > 0);
    column_turns.next(pair.j);
  });
  for (int64_t i = 0; loss && i < layout.n; ++i) loss[i] = float(losses[size_t(i)]);
  if (!need_image && !need_text) return;
  double total = 0;
  for (int64_t i = 0; i < layout.n; ++i)
    total += weights[size_t(i)] * (problem.grad ? problem.grad[i] : 1.0f);
  *grad_bias = float(total);
  double by_image = 0, by_text = 0;
  if (need_image)
    by_image = finish(layout, image, dx.as<float>(), problem.scale, grad_image, threads);
  if (need_text) by_text = finish(layout, text, dy.as<float>(), problem.scale, grad_text, threads);
  *grad_scale = float(need_image ? by_image : by_text);
}

}  // namespace

void pair_sigmoid(const float* grad, const void* image, const void* text, const float* scale,
                  const float* bias, float* loss, void* grad_image, void* grad_text,
                  float* grad_scale, float* grad_bias, int64_t n, int64_t d, bool normalize,
                  int dtype, int threads) {
  threads = threads_for(3 * n * n * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Layout layout{n, d, block_rows(n, d), is_paired<T>(), normalize};
    const Problem problem{layout, *scale, *bias, grad, grad_image != nullptr, grad_text != nullptr};
    run<T>(problem, static_cast<const T*>(image), static_cast<const T*>(text), loss,
           static_cast<T*>(grad_image), static_cast<T*>(grad_text), grad_scale, grad_bias, threads);
  });
}

}  // namespace fastcl
