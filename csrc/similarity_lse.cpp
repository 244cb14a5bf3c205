// Log-sum-exp of a similarity matrix that is never stored.
//
//   s_ij     = t · q̂_i·k̂_j                    q̂ = q / max(‖q‖, 1e-12), or q
//   row_i    = log Σ_j exp s_ij                over the j with id_i ≠ id_j
//   column_j = log Σ_i exp s_ij
//   mean_i   = Σ_j exp(s_ij − row_i) k̂_j
//   W_ij     = g_i exp(s_ij − row_i) + h_j exp(s_ij − column_j)
//   ∂/∂q̂_i  = t Σ_j W_ij k̂_j,   ∂/∂k̂_j = t Σ_i W_ij q̂_i,   ∂/∂t = Σ_ij W_ij q̂_i·k̂_j
//
// One matrix product forward, three backward; with the mean two in all. Rows and columns come from
// the same pass. Memory O((N + M)·D); the same bits for any number of threads.
// Plain version: fastcl/reference/similarity_lse.py. Triton twin: kernels/similarity_lse.py.
#include "matrix.h"

namespace fastcl {
namespace {

// With this few blocks of queries the keys are packed where they are used, in L2: a queue of 65,536
// keys is read once and not written out again, which would cost as much as a tenth of the products.
constexpr int64_t FEW_BLOCKS = 4;

Pass pass_of(int64_t n, int64_t m, int64_t d, bool paired, bool normalize, const int64_t* query_ids,
             const int64_t* key_ids, float scale) {
  const Layout query{n, d, block_rows(n, d), paired, normalize};
  const Layout key{m, d, block_rows(m, d), paired, normalize};
  return {query, key, query_ids, key_ids, scale, false};
}

// Running means beside the totals: numerators (blocks, panels, block, NR) relative to the maximum.
class Means {
 public:
  Means(const Layout& layout, bool wanted)
      : layout_(layout), memory_(size_t(wanted ? layout.blocks() * layout.sums_size() : 0) * 4) {}

  // total ← total · old_i + part · new_i, row by row.
  void merge(int64_t b, const float* part, const float* old_factor, const float* part_factor,
             bool first) const {
    float* total = memory_.as<float>() + b * layout_.sums_size();
    for (int64_t panel = 0; panel < layout_.panels(); ++panel)
      for (int64_t r = 0; r < layout_.rows(b); ++r)
        for (int v = 0; v < 2; ++v) {
          const int64_t at = (panel * layout_.block + r) * NR + v * LANES;
          const F x = load(part + at) * part_factor[r];
          store(total + at, first ? x : fma(load(total + at), broadcast(old_factor[r]), x));
        }
  }
  void divide(const Totals& totals, float* mean, int threads) const {
    in_order(layout_.blocks(), threads, [&](int64_t b, int) {
      const float* from = memory_.as<float>() + b * layout_.sums_size();
      for (int64_t r = 0; r < layout_.rows(b); ++r) {
        const int64_t i = b * layout_.block + r, d = layout_.d;
        const float l = totals[i].sum[0], inverse = l == 0 ? 0 : 1 / l;
        for (int64_t k = 0; k < d; k += LANES) {
          const F x = load(from + (k / NR * layout_.block + r) * NR + k % NR) * inverse;
          store(mean + i * d + k, l == 0 ? F{} : x, d - k);
        }
      }
    });
  }

 private:
  Layout layout_;
  Scratch memory_;
};

template <class T, bool COLUMNS, bool MEAN>
void forward(const T* query, const T* key, float scale, const int64_t* query_ids,
             const int64_t* key_ids, float* row_lse, float* column_lse, float* mean, int64_t n,
             int64_t m, int64_t d, bool normalize, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  constexpr int KEY_PARTS = MEAN ? RIGHT | VALUES : RIGHT;
  const Pass pass = pass_of(n, m, d, PAIRED, normalize, query_ids, key_ids, scale);
  const bool few = pass.query.blocks() <= FEW_BLOCKS;
  const Matrix<T> q(pass.query, LEFT, query, 0, threads);
  const Workspaces workspaces(threads, PAIRED, MEAN ? pass.query.sums_size() : 0,
                              few ? packed_size(pass.key, KEY_PARTS) : 0,
                              few ? packing_size(pass.key) : 0);
  const Totals rows(pass.query), columns(pass.key);
  const Means means(pass.query, MEAN);
  Turns row_turns(pass.query.blocks()), column_turns(pass.key.blocks());

  const auto run = [&](const Workspace& work, const BlockPair& pair, const Block& k,
                       Ahead ahead = {}) {
    const Sums row = block_sums(work.sums), column = block_sums(work.sums + 2 * BLOCK_MAX);
    float *old = work.sums + 4 * BLOCK_MAX, *now = old + BLOCK_MAX;
    clear(row, pass.query.block);
    forward_pair<PAIRED, COLUMNS, MEAN>(pass, q[pair.i], k, work, row, column, ahead);
    if (MEAN) times_keys<PAIRED>(pass, q[pair.i], k, work, work.mean, false);
    row_turns.wait(pair.i, pair.turn_i);
    merge(rows[q[pair.i].first], row, pass.query.block, old, now);
    if (MEAN) means.merge(pair.i, work.mean, old, now, pair.turn_i == 0);
    row_turns.next(pair.i);
    if (!COLUMNS) return;
    column_turns.wait(pair.j, pair.turn_j);
    merge(columns[k.first], column, pass.key.block);
    column_turns.next(pair.j);
  };

  if (few) {
    in_order(pass.key.blocks(), threads, [&](int64_t j, int thread) {
      const Workspace work = workspaces[thread];
      const Block k =
          pack_block(pass.key, KEY_PARTS, key, j, pass.scale, work.packed, work.packing);
      // The keys that this thread will probably pack next.
      const int64_t next = std::min((j + threads) * pass.key.block, m);
      const int64_t keys = std::min(pass.key.block, m - next);
      const Ahead ahead{reinterpret_cast<const char*>(key + next * d),
                        keys * d * int64_t(sizeof(T))};
      for (int64_t i = 0; i < pass.query.blocks(); ++i)
        run(work, {i, j, j, i}, k, ahead.part(i, pass.query.blocks()));
    });
  } else {
    const Rectangle rectangle{pass.query.blocks(), pass.key.blocks()};
    const Matrix<T> k(pass.key, KEY_PARTS, key, pass.scale, threads);
    in_order(rectangle.tasks(), threads, [&](int64_t task, int thread) {
      const BlockPair pair = rectangle.pair(task);
      run(workspaces[thread], pair, k[pair.j]);
    });
  }
  rows.lse(row_lse, n);
  if (COLUMNS) columns.lse(column_lse, m);
  if (MEAN) means.divide(rows, mean, threads);
}

template <class T>
void backward(const float* grad_rows, const float* grad_columns, const T* query, const T* key,
              float scale, const int64_t* query_ids, const int64_t* key_ids, const float* row_lse,
              const float* column_lse, T* grad_query, T* grad_key, float* grad_scale, int64_t n,
              int64_t m, int64_t d, bool normalize, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Pass pass = pass_of(n, m, d, PAIRED, normalize, query_ids, key_ids, scale);
  const Rectangle rectangle{pass.query.blocks(), pass.key.blocks()};
  // The scale's gradient comes out of either side's sums.
  const bool need_key = grad_key != nullptr, need_query = grad_query != nullptr || !need_key;
  const Matrix<T> q(pass.query, need_key ? LEFT | VALUES : LEFT, query, 0, threads);
  const Matrix<T> k(pass.key, need_query ? RIGHT | VALUES : RIGHT, key, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const GradWeights g(pass.query, grad_rows, row_lse), h(pass.key, grad_columns, column_lse);
  const int64_t query_size = pass.query.sums_size(), key_size = pass.key.sums_size();
  const Scratch dq(size_t(need_query ? pass.query.blocks() * query_size : 0) * 4);
  const Scratch dk(size_t(need_key ? pass.key.blocks() * key_size : 0) * 4);
  Turns query_turns(pass.query.blocks()), key_turns(pass.key.blocks());
  in_order(rectangle.tasks(), threads, [&](int64_t task, int thread) {
    const BlockPair pair = rectangle.pair(task);
    const Workspace work = workspaces[thread];
    const Block &qi = q[pair.i], &kj = k[pair.j];
    const auto weigh = [&](auto of_rows, auto of_columns) {
      weights_pair<PAIRED, of_rows(), of_columns()>(pass, qi, kj, work, g.weights(), h.weights(),
                                                    need_query, need_key);
    };
    if (grad_rows && grad_columns)
      weigh(std::true_type{}, std::true_type{});
    else if (grad_rows)
      weigh(std::true_type{}, std::false_type{});
    else
      weigh(std::false_type{}, std::true_type{});
    if (need_query) {
      query_turns.wait(pair.i, pair.turn_i);
      times_keys<PAIRED>(pass, qi, kj, work, dq.as<float>() + pair.i * query_size, pair.turn_i > 0);
      query_turns.next(pair.i);
    }
    if (need_key) {
      key_turns.wait(pair.j, pair.turn_j);
      times_queries<PAIRED>(pass, qi, kj, work, dk.as<float>() + pair.j * key_size,
                            pair.turn_j > 0);
      key_turns.next(pair.j);
    }
  });
  double by_query = 0, by_key = 0;
  if (need_query) by_query = finish(pass.query, query, dq.as<float>(), scale, grad_query, threads);
  if (need_key) by_key = finish(pass.key, key, dk.as<float>(), scale, grad_key, threads);
  *grad_scale = float(need_query ? by_query : by_key);
}

}  // namespace

void similarity_lse_forward(const void* query, const void* key, const float* scale,
                            const int64_t* query_ids, const int64_t* key_ids, float* row_lse,
                            float* column_lse, int64_t n, int64_t m, int64_t d, bool normalize,
                            int dtype, int threads) {
  if (!row_lse) {  // s is its own transpose's transpose
    if (!column_lse) return;
    std::swap(query, key), std::swap(query_ids, key_ids), std::swap(n, m);
    std::swap(row_lse, column_lse);
  }
  if (n == 0 || m == 0) {
    std::fill_n(row_lse, n, -INF);
    if (column_lse) std::fill_n(column_lse, m, -INF);
    return;
  }
  threads = threads_for(n * m * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = column_lse ? forward<T, true, false> : forward<T, false, false>;
    run(static_cast<const T*>(query), static_cast<const T*>(key), *scale, query_ids, key_ids,
        row_lse, column_lse, nullptr, n, m, d, normalize, threads);
  });
}

void similarity_lse_forward_with_mean(const void* query, const void* key, const float* scale,
                                      const int64_t* query_ids, const int64_t* key_ids,
                                      float* row_lse, float* mean_key, int64_t n, int64_t m,
                                      int64_t d, bool normalize, int dtype, int threads) {
  if (n == 0 || m == 0) {
    std::fill_n(row_lse, n, -INF), std::fill_n(mean_key, n * d, 0.0f);
    return;
  }
  threads = threads_for(2 * n * m * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward<T, false, true>(static_cast<const T*>(query), static_cast<const T*>(key), *scale,
                            query_ids, key_ids, row_lse, nullptr, mean_key, n, m, d, normalize,
                            threads);
  });
}

void similarity_lse_backward(const float* grad_rows, const float* grad_columns, const void* query,
                             const void* key, const float* scale, const int64_t* query_ids,
                             const int64_t* key_ids, const float* row_lse, const float* column_lse,
                             void* grad_query, void* grad_key, float* grad_scale, int64_t n,
                             int64_t m, int64_t d, bool normalize, int dtype, int threads) {
  threads = threads_for(3 * n * m * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *dq = static_cast<T*>(grad_query), *dk = static_cast<T*>(grad_key);
    if (n == 0 || m == 0 || (!grad_rows && !grad_columns)) {
      if (dq) std::fill_n(dq, n * d, T{});
      if (dk) std::fill_n(dk, m * d, T{});
      *grad_scale = 0;
      return;
    }
    backward<T>(grad_rows, grad_columns, static_cast<const T*>(query), static_cast<const T*>(key),
                *scale, query_ids, key_ids, row_lse, column_lse, dq, dk, grad_scale, n, m, d,
                normalize, threads);
  });
}

}  // namespace fastcl
