// Similarities of queries to gathered rows of a memory bank.
//
//   s_nk = t · q_n · bank[index_nk]
//   ∂/∂q_n = t Σ_k g_nk bank[index_nk],   ∂/∂t = Σ_nk g_nk q_n · bank[index_nk]
//
// Bound by memory. Few pairs: a row of the bank is a random place, read once forward and once
// backward, and asked for IN_FLIGHT bytes before it is needed. More pairs than rows: they go in the
// order of the bank (bank_order.h), which is then read once a direction and thread. The gathered
// (N, K, D) is never stored.
// Plain version: fastcl/reference/bank_scores.py. Triton twin: kernels/bank_scores.py.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "bank_order.h"
#include "ops.h"
#include "scratch.h"

namespace fastcl {
namespace {

constexpr int64_t IN_FLIGHT = 8192;  // bytes: 128 cache lines of 100 ns each, 80 GB/s a core

template <class T>
void prefetch(const T* row, int64_t d) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < d * int64_t(sizeof(T)); b += 64) __builtin_prefetch(bytes + b);
}

// use(k, row) for every k, the rows asked for in time.
template <class T, class Use>
void for_rows(const T* bank, const int64_t* index, int64_t count, int64_t d, Use use) {
  const int64_t ahead = std::clamp<int64_t>(IN_FLIGHT / (d * int64_t(sizeof(T))), 2, 64);  // rows
  for (int64_t k = 0; k < std::min(ahead, count); ++k) prefetch(bank + index[k] * d, d);
  for (int64_t k = 0; k < count; ++k) {
    if (k + ahead < count) prefetch(bank + index[k + ahead] * d, d);
    use(k, bank + index[k] * d);
  }
}

// x (D,) is float; D is padded to the vector, with zeros.
template <class T>
float dot(const float* x, const T* row, int64_t d) {
  F a{}, b{};
  int64_t j = 0;
  for (; j + 2 * LANES <= d; j += 2 * LANES) {
    a = fma(load(x + j), load(row + j), a);
    b = fma(load(x + j + LANES), load(row + j + LANES), b);
  }
  for (; j < d; j += LANES) a = fma(load(x + j), load(row + j, d - j), a);
  return sum(a + b);
}

// total += Σ_c g_c row_c, V vectors of it in registers; row(c) and weight(c) of a run.
template <int V, class Row, class Weight>
void add_vectors(float* total, int64_t count, int64_t j, int64_t left, Row row, Weight weight) {
  F sums[V];
  for (int v = 0; v < V; ++v) sums[v] = load(total + j + v * LANES);
  for (int64_t c = 0; c < count; ++c) {
    const F g = broadcast(weight(c));
    for (int v = 0; v < V; ++v) {
      const auto* x = row(c) + j + v * LANES;
      sums[v] = fma(g, V > 1 ? load(x) : load(x, left), sums[v]);
    }
  }
  for (int v = 0; v < V; ++v) store(total + j + v * LANES, sums[v]);
}

// total (D padded to the vector,).
template <class Row, class Weight>
void add_run(float* total, int64_t count, int64_t d, Row row, Weight weight) {
  int64_t j = 0;
  for (; j + 8 * LANES <= d; j += 8 * LANES) add_vectors<8>(total, count, j, d - j, row, weight);
  for (; j < d; j += LANES) add_vectors<1>(total, count, j, d - j, row, weight);
}

int64_t padded(int64_t d) { return (d + LANES - 1) / LANES * LANES; }

template <class T>
void widen(const T* x, float* out, int64_t d) {
  for (int64_t j = 0; j < d; j += LANES) store(out + j, load(x + j, d - j));
}

// Calls f with null pointers of the two storage types.
template <class Function>
void with_types(int query_dtype, int bank_dtype, Function f) {
  with_type(query_dtype, [&](auto* q) { with_type(bank_dtype, [&](auto* b) { f(q, b); }); });
}

constexpr int64_t PARALLEL = 1 << 14;  // multiply-adds below which one thread is faster

void check_index(const int64_t* index, int64_t count, int64_t m) {
  bool inside = true;
  for (int64_t c = 0; c < count; ++c) inside &= uint64_t(index[c]) < uint64_t(m);
  if (!inside) throw std::out_of_range("bank_scores: an index lies outside the bank.");
}

}  // namespace

void bank_scores_forward(const void* query, const void* bank, const int64_t* index,
                         const float* scale, float* scores, int64_t n, int64_t k, int64_t m,
                         int64_t d, int dtype, int bank_dtype, int threads) {
  check_index(index, n * k, m);
  with_types(dtype, bank_dtype, [&](auto* query_type, auto* bank_type) {
    const auto* q = static_cast<decltype(query_type)>(const_cast<void*>(query));
    const auto* rows = static_cast<decltype(bank_type)>(const_cast<void*>(bank));
    float* out = scores;  // clang 14 loses what a lambda in a parallel region captures twice
    const float t = *scale;
    const int64_t width = padded(d);
    const BankOrder order(n, k, m, d, d * int64_t(sizeof *rows));
    order.for_groups(n * k * d > PARALLEL ? threads : 1, [&](int64_t first, int64_t last) {
      const int64_t query0 = order.query(first), queries = order.query(last - 1) + 1 - query0;
      const Scratch memory(size_t(queries * width) * 4);
      float* x = memory.as<float>();  // (queries of the group, width)
      for (int64_t i = 0; i < queries; ++i) widen(q + (query0 + i) * d, x + i * width, d);
      const auto of = [&](int64_t task) { return x + (order.query(task) - query0) * width; };
      if (!order.pays()) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t at = order.place(task);
          const float* xi = of(task);
          for_rows(rows, index + at, order.columns(task), d,
                   [&](int64_t c, const auto* row) { out[at + c] = t * dot(xi, row, d); });
        }
        return;
      }
      const int64_t at = order.place(first);
      const SortedPairs<uint32_t> pairs(order, index, first, last,
                                        [&](int64_t c) { return uint32_t(c - at); });
      pairs.for_runs([&](int64_t row) { prefetch(rows + row * d, d); },
                     [&](int64_t task, const auto* pair, int64_t count, int64_t block) {
                       const float* xi = of(task);
                       for (int64_t c = 0; c < count; ++c)
                         out[at + pair[c].with] =
                             t * dot(xi, rows + (block + pairs.row(pair[c])) * d, d);
                     });
    });
  });
}

void bank_scores_backward(const float* grad, const void* query, const void* bank,
                          const int64_t* index, const float* scale, void* grad_query,
                          float* grad_scale, int64_t n, int64_t k, int64_t m, int64_t d, int dtype,
                          int bank_dtype, int threads) {
  check_index(index, n * k, m);
  if (n * k * d <= PARALLEL) threads = 1;
  std::vector<double> products(size_t(n), 0.0);
  with_types(dtype, bank_dtype, [&](auto* query_type, auto* bank_type) {
    using Q = decltype(query_type);
    const auto* q = static_cast<Q>(const_cast<void*>(query));
    const auto* rows = static_cast<decltype(bank_type)>(const_cast<void*>(bank));
    Q dq = static_cast<Q>(grad_query);
    const float* g = grad;  // as above
    const int64_t width = padded(d);
    const BankOrder order(n, k, m, d, d * int64_t(sizeof *rows));
    const Scratch memory(size_t(order.tasks() * width) * 4);
    float* sums = memory.as<float>();  // (N, pieces, width): Σ_k g_nk bank[index_nk]
    order.for_groups(threads, [&](int64_t first, int64_t last) {
      std::fill(sums + first * width, sums + last * width, 0.0f);
      if (!order.pays()) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t at = order.place(task);
          float* total = sums + task * width;
          for_rows(rows, index + at, order.columns(task), d, [&](int64_t c, const auto* row) {
            add_run(total, 1, d, [&](int64_t) { return row; }, [&](int64_t) { return g[at + c]; });
          });
        }
        return;
      }
      const SortedPairs<float> pairs(order, index, first, last, [&](int64_t c) { return g[c]; });
      pairs.for_runs([&](int64_t row) { prefetch(rows + row * d, d); },
                     [&](int64_t task, const auto* pair, int64_t count, int64_t block) {
                       add_run(
                           sums + task * width, count, d,
                           [&](int64_t c) { return rows + (block + pairs.row(pair[c])) * d; },
                           [&](int64_t c) { return pair[c].with; });
                     });
    });
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < n; ++i) {
      float* total = sums + i * order.pieces * width;
      for (int64_t piece = 1; piece < order.pieces; ++piece)
        for (int64_t j = 0; j < width; j += LANES)
          store(total + j, load(total + j) + load(total + piece * width + j));
      products[size_t(i)] = dot(total, q + i * d, d);
      for (int64_t j = 0; j < d; j += LANES) store(dq + i * d + j, load(total + j) * *scale, d - j);
    }
  });
  double total = 0;
  for (double product : products) total += product;
  *grad_scale = float(total);
}

}  // namespace fastcl
