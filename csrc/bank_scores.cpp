// Similarities of queries to gathered rows of a memory bank.
//
//   s_nk = t · q_n · bank[index_nk]
//   ∂/∂q_n = t Σ_k g_nk bank[index_nk],   ∂/∂t = Σ_nk g_nk q_n · bank[index_nk]
//
// Bound by memory. Few pairs: a row of the bank is a random place, read once forward and once
// backward, and asked for IN_FLIGHT bytes before it is needed. More pairs than rows: they go in the
// order of the bank (bank_order.h), which is then read once a direction and group of queries. The
// gathered (N, K, D) is never stored.
// Plain version: fastcl/reference/bank_scores.py. Triton twin: kernels/bank_scores.py.
#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "bank_order.h"
#include "ops.h"
#include "prefetch.h"
#include "scratch.h"

namespace fastcl {
namespace {

constexpr int64_t IN_FLIGHT = 8192;  // bytes: 128 cache lines of 100 ns each, 80 GB/s a core

// use(k, row) for every k, the rows asked for in time.
template <class T, class Use>
void for_rows(const T* bank, const int64_t* index, int64_t count, int64_t d, Use use) {
  const int64_t ahead = std::clamp<int64_t>(IN_FLIGHT / (d * int64_t(sizeof(T))), 2, 64);  // rows
  for (int64_t k = 0; k < std::min(ahead, count); ++k) prefetch<CLOSE>(bank + index[k] * d, d);
  for (int64_t k = 0; k < count; ++k) {
    if (k + ahead < count) prefetch<CLOSE>(bank + index[k + ahead] * d, d);
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

constexpr int64_t PAIRS = 4;  // whose products go side by side

// r[p] = x(p) · row(p)
template <class X, class Row>
void dots(float* r, int64_t d, X x, Row row) {
  const float* xs[PAIRS];
  decltype(row(0)) rows[PAIRS];
  for (int64_t p = 0; p < PAIRS; ++p) xs[p] = x(p), rows[p] = row(p);
  F sums[PAIRS]{};
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES)
    for (int p = 0; p < PAIRS; ++p) sums[p] = fma(load(xs[p] + j), load(rows[p] + j), sums[p]);
  if (j < d)
    for (int p = 0; p < PAIRS; ++p)
      sums[p] = fma(load(xs[p] + j), load(rows[p] + j, d - j), sums[p]);
  for (int p = 0; p < PAIRS; ++p) r[p] = sum(sums[p]);
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

template <class T>
void widen(const T* x, float* out, int64_t d) {
  for (int64_t j = 0; j < d; j += LANES) store(out + j, load(x + j, d - j));
}

void check_index(const int64_t* index, int64_t count, int64_t m, int threads) {
  bool inside = true;
#pragma omp parallel for num_threads(threads) schedule(static) \
    reduction(&& : inside) if (threads > 1)
  for (int64_t c = 0; c < count; ++c) inside = inside && uint64_t(index[c]) < uint64_t(m);
  if (!inside) throw std::out_of_range("bank_scores: an index lies outside the bank.");
}

// The rows bank (M, D)[index (N, K)].
template <class T>
struct Gathered {
  const T* bank;
  const int64_t* index;
  int64_t n, k, m, d;
  int threads;

  int64_t width() const { return padded(d); }  // of a query's row in float
  const T* row(int64_t i) const { return bank + i * d; }
  BankOrder order() const { return BankOrder(n, k, m, d, d * int64_t(sizeof(T))); }
};

constexpr int64_t PARALLEL = 1 << 14;  // multiply-adds below which one thread is faster

// f(gathered) of the bank's storage type.
template <class Function>
void with_gathered(const void* bank, const int64_t* index, int64_t n, int64_t k, int64_t m,
                   int64_t d, int dtype, int threads, Function f) {
  if (n * k * d <= PARALLEL) threads = 1;
  check_index(index, n * k, m, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    f(Gathered<T>{static_cast<const T*>(bank), index, n, k, m, d, threads});
  });
}

// The index (N, K) in pieces, up to `size` columns of one query: enough of them for many threads.
struct Pieces {
  int64_t k, size, of_query, count;

  Pieces(int64_t n, int64_t k_) : k(k_) {
    size = std::clamp<int64_t>(n * k / 64, 1 << 10, 1 << 13);
    of_query = std::max<int64_t>(1, (k + size - 1) / size);
    count = n * of_query;
  }
  int64_t query(int64_t piece) const { return piece / of_query; }
  int64_t place(int64_t piece) const { return query(piece) * k + piece % of_query * size; }
  int64_t columns(int64_t piece) const { return std::min(size, k - piece % of_query * size); }
};

// ---- forward: scores (N, K) = t · x · row, x (N, width) ----------------------------------------

template <class T>
void scores_in_order_of_index(const Gathered<T>& o, const float* x, float t, float* scores) {
  const Pieces pieces(o.n, o.k);
#pragma omp parallel for num_threads(o.threads) schedule(static) if (o.threads > 1)
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const NoSubnormals fast;
    const float* xi = x + pieces.query(piece) * o.width();
    float* out = scores + pieces.place(piece);
    for_rows(o.bank, o.index + pieces.place(piece), pieces.columns(piece), o.d,
             [&](int64_t c, const T* row) { out[c] = t * dot(xi, row, o.d); });
  }
}

template <class T>
void scores_in_order_of_bank(const Gathered<T>& o, const float* x, float t, float* scores) {
  const BankOrder order = o.order();
  const int64_t width = o.width();
  for (int64_t g = 0; g < order.groups; ++g) {
    const int64_t first = order.first(g);
    const float* xs = x + order.query0(g) * width;
    float* out = scores + first;
    const SortedPairs<uint32_t> pairs(order, o.index, g, o.threads,
                                      [&](int64_t c) { return uint32_t(c - first); });
#pragma omp parallel for num_threads(o.threads) schedule(dynamic) if (o.threads > 1)
    for (int64_t range = 0; range < order.ranges; ++range) {
      const NoSubnormals fast;
      const T* rows = o.row(order.row0(range));
      pairs.for_blocks(
          range, [&](int64_t row) { prefetch<NEAR>(rows + row * o.d, o.d); },
          [&](const auto* pair, int64_t left) {
            const auto some = [&](int64_t p) { return pair[std::min(p, left - 1)]; };
            float products[PAIRS];
            dots(
                products, o.d, [&](int64_t p) { return xs + pairs.query(some(p)) * width; },
                [&](int64_t p) { return rows + pairs.row(some(p)) * o.d; });
            for (int64_t p = 0; p < PAIRS; ++p) out[some(p).with] = t * products[p];
            return std::min(PAIRS, left);
          });
    }
  }
}

// ---- backward: sums (N, D padded) = Σ_k g_nk bank[index_nk] ------------------------------------

// sums (rows, width) += Σ of `count` such arrays, one after the other.
void add_parts(float* sums, const float* parts, int64_t count, int64_t rows, int64_t width,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t part = 0; part < count; ++part)
      for (int64_t j = i * width; j < (i + 1) * width; j += LANES)
        store(sums + j, load(sums + j) + load(parts + part * rows * width + j));
}

template <class T>
void sums_in_order_of_index(const Gathered<T>& o, const float* grad, float* sums) {
  const Pieces pieces(o.n, o.k);
  const int64_t width = o.width();
  const Scratch memory(size_t(pieces.count * width) * 4);
  float* parts = memory.as<float>();  // (N, pieces of a query, width)
#pragma omp parallel for num_threads(o.threads) schedule(static) if (o.threads > 1)
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const NoSubnormals fast;
    const float* g = grad + pieces.place(piece);
    float* total = parts + piece * width;
    std::fill_n(total, width, 0.0f);
    for_rows(o.bank, o.index + pieces.place(piece), pieces.columns(piece), o.d,
             [&](int64_t c, const T* row) {
               add_run(total, 1, o.d, [&](int64_t) { return row; }, [&](int64_t) { return g[c]; });
             });
  }
#pragma omp parallel for num_threads(o.threads) schedule(static) if (o.threads > 1)
  for (int64_t i = 0; i < o.n; ++i)
    add_parts(sums + i * width, parts + i * pieces.of_query * width, pieces.of_query, 1, width, 1);
}

template <class T>
void sums_in_order_of_bank(const Gathered<T>& o, const float* grad, float* sums) {
  const BankOrder order = o.order();
  const int64_t width = o.width();
  for (int64_t g = 0; g < order.groups; ++g) {
    const int64_t size = order.queries(g) * width;
    const Scratch memory(size_t(order.ranges * size) * 4);
    float* parts = memory.as<float>();  // (ranges, queries of the group, width)
    const SortedPairs<float> pairs(order, o.index, g, o.threads,
                                   [&](int64_t c) { return grad[c]; });
#pragma omp parallel for num_threads(o.threads) schedule(dynamic) if (o.threads > 1)
    for (int64_t range = 0; range < order.ranges; ++range) {
      const NoSubnormals fast;
      const T* rows = o.row(order.row0(range));
      float* total = parts + range * size;
      std::fill_n(total, size, 0.0f);
      pairs.for_blocks(
          range, [&](int64_t row) { prefetch<NEAR>(rows + row * o.d, o.d); },
          [&](const auto* pair, int64_t left) {
            const int64_t count = pairs.run(pair, left);
            add_run(
                total + pairs.query(*pair) * width, count, o.d,
                [&](int64_t c) { return rows + pairs.row(pair[c]) * o.d; },
                [&](int64_t c) { return pair[c].with; });
            return count;
          });
    }
    add_parts(sums + order.query0(g) * width, parts, order.ranges, order.queries(g), width,
              o.threads);
  }
}

}  // namespace

void bank_scores_forward(const void* query, const void* bank, const int64_t* index,
                         const float* scale, float* scores, int64_t n, int64_t k, int64_t m,
                         int64_t d, int dtype, int bank_dtype, int threads) {
  const int64_t width = padded(d);
  const Scratch memory(size_t(n * width) * 4);
  float* x = memory.as<float>();
  with_type(dtype, [&](auto* type) {
    const auto* q = static_cast<decltype(type)>(const_cast<void*>(query));
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k * d > PARALLEL)
    for (int64_t i = 0; i < n; ++i) widen(q + i * d, x + i * width, d);
  });
  with_gathered(bank, index, n, k, m, d, bank_dtype, threads, [&](const auto& o) {
    o.order().pays() ? scores_in_order_of_bank(o, x, *scale, scores)
                     : scores_in_order_of_index(o, x, *scale, scores);
  });
}

void bank_scores_backward(const float* grad, const void* query, const void* bank,
                          const int64_t* index, const float* scale, void* grad_query,
                          float* grad_scale, int64_t n, int64_t k, int64_t m, int64_t d, int dtype,
                          int bank_dtype, int threads) {
  const int64_t width = padded(d);
  const Scratch memory(size_t(n * width) * 4);
  float* sums = memory.as<float>();
  std::fill_n(sums, n * width, 0.0f);
  with_gathered(bank, index, n, k, m, d, bank_dtype, threads, [&](const auto& o) {
    o.order().pays() ? sums_in_order_of_bank(o, grad, sums) : sums_in_order_of_index(o, grad, sums);
  });
  std::vector<double> products(size_t(n), 0.0);
  with_type(dtype, [&](auto* type) {
    const auto* q = static_cast<decltype(type)>(const_cast<void*>(query));
    auto* dq = static_cast<decltype(type)>(grad_query);
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k * d > PARALLEL)
    for (int64_t i = 0; i < n; ++i) {
      const float* total = sums + i * width;
      products[size_t(i)] = dot(total, q + i * d, d);
      for (int64_t j = 0; j < d; j += LANES)
        store(dq + i * d + j, load(total + j) * broadcast(*scale), d - j);
    }
  });
  double product = 0;
  for (double of_query : products) product += of_query;
  *grad_scale = float(product);
}

}  // namespace fastcl
