// Log-sum-exp of the similarities of rows to the other rows; the matrix is never stored.
//
//   s_ij  = t · ẑ_i·ẑ_j                       ẑ = z / max(‖z‖, 1e-12), or z
//   lse_i = log Σ_j exp s_ij                  over the j ≠ i with id_j ≠ id_i
//   W_ij  = g_i exp(s_ij − lse_i) + g_j exp(s_ij − lse_j)
//   ∂/∂ẑ_i = t Σ_j W_ij ẑ_j,   ∂/∂t = ½ Σ_ij W_ij ẑ_i·ẑ_j
//
// s is symmetric, so a pair of blocks i < j is computed once for the rows of both: half a matrix
// product forward, one and a half backward. Memory O(N·D); the same bits for any number of threads.
// Plain version: fastcl/reference/self_similarity_lse.py.
// Triton twin: kernels/self_similarity_lse.py.
#include "matrix.h"

namespace fastcl {
namespace {

Pass pass_of(int64_t n, int64_t d, bool paired, bool normalize, const int64_t* ids, float scale) {
  const Layout layout{n, d, block_rows(n, d), paired, normalize};
  return {layout, layout, ids, ids, scale, true};
}

template <class T>
void forward(const T* z, float scale, const int64_t* ids, float* lse, int64_t n, int64_t d,
             bool normalize, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Pass pass = pass_of(n, d, PAIRED, normalize, ids, scale);
  const Triangle triangle{pass.query.blocks()};
  const Matrix<T> packed(pass.query, LEFT | RIGHT, z, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const Totals totals(pass.query);
  Turns turns(pass.query.blocks());
  in_order(triangle.tasks(), threads, [&](int64_t task, int thread) {
    const BlockPair pair = triangle.pair(task);
    if (pair.i < 0) return;
    const Block &q = packed[pair.i], &k = packed[pair.j];
    const Workspace work = workspaces[thread];
    const Sums rows = block_sums(work.sums), columns = block_sums(work.sums + 2 * BLOCK_MAX);
    clear(rows, pass.query.block);
    forward_pair<PAIRED, true, false>(pass, q, k, work, rows, columns);
    turns.wait(pair.i, pair.turn_i);
    merge(totals[q.first], rows, pass.query.block);
    if (pair.i == pair.j) {
      merge(totals[q.first], columns, pass.query.block);
    } else {
      turns.wait(pair.j, pair.turn_j);
      merge(totals[k.first], columns, pass.query.block);
      turns.next(pair.j);
    }
    turns.next(pair.i);
  });
  totals.lse(lse, n);
}

template <class T>
void backward(const float* grad, const T* z, float scale, const int64_t* ids, const float* lse,
              T* grad_z, float* grad_scale, int64_t n, int64_t d, bool normalize, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Pass pass = pass_of(n, d, PAIRED, normalize, ids, scale);
  const Layout& layout = pass.query;
  const Triangle triangle{layout.blocks()};
  const Matrix<T> packed(layout, LEFT | RIGHT | VALUES, z, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const GradWeights g(layout, grad, lse);
  const Scratch sums(size_t(layout.blocks() * layout.sums_size()) * 4);  // Σ_j W_ij ẑ_j
  Turns turns(layout.blocks());
  in_order(triangle.tasks(), threads, [&](int64_t task, int thread) {
    const BlockPair pair = triangle.pair(task);
    if (pair.i < 0) return;
    const Block &q = packed[pair.i], &k = packed[pair.j];
    const Workspace work = workspaces[thread];
    float* dq = sums.as<float>() + pair.i * layout.sums_size();
    float* dk = sums.as<float>() + pair.j * layout.sums_size();
    weights_pair<PAIRED, true, true>(pass, q, k, work, g.weights(), g.weights(), true, true);
    turns.wait(pair.i, pair.turn_i);
    times_keys<PAIRED>(pass, q, k, work, dq, pair.turn_i > 0);
    if (pair.i != pair.j) {
      turns.next(pair.i);
      turns.wait(pair.j, pair.turn_j);
    }
    times_queries<PAIRED>(pass, q, k, work, dk, pair.turn_j > 0 || pair.i == pair.j);
    turns.next(pair.j);
  });
  const double total = finish(layout, z, sums.as<float>(), scale, grad_z, threads);
  *grad_scale = float(total / 2);
}

}  // namespace

void self_similarity_lse_forward(const void* z, const float* scale, const int64_t* ids, float* lse,
                                 int64_t n, int64_t d, bool normalize, int dtype, int threads) {
  threads = threads_for(n * n * d / 2, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward<T>(static_cast<const T*>(z), *scale, ids, lse, n, d, normalize, threads);
  });
}

void self_similarity_lse_backward(const float* grad, const void* z, const float* scale,
                                  const int64_t* ids, const float* lse, void* grad_z,
                                  float* grad_scale, int64_t n, int64_t d, bool normalize,
                                  int dtype, int threads) {
  threads = threads_for(3 * n * n * d / 2, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward<T>(grad, static_cast<const T*>(z), *scale, ids, lse, static_cast<T*>(grad_z),
                grad_scale, n, d, normalize, threads);
  });
}

}  // namespace fastcl
