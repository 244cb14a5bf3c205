// Similarities of queries to gathered rows of a memory bank.
//
//   s_nk = t · q_n · bank[index_nk]
//   ∂/∂q_n = t Σ_k g_nk bank[index_nk],   ∂/∂t = Σ_nk g_nk q_n · bank[index_nk]
//
// Bound by memory: a row of the bank is a random place, read once forward and once backward, and
// asked for IN_FLIGHT bytes before it is needed. The gathered (N, K, D) is never stored.
// Plain version: fastcl/reference/bank_scores.py. Triton twin: kernels/bank_scores.py.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "scratch.h"

namespace fastcl {
namespace {

constexpr int64_t IN_FLIGHT = 8192;  // bytes: 128 cache lines of 100 ns each, 80 GB/s a core
constexpr int64_t PIECE = 1024;      // rows of one query: the unit of work, summed in order

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

template <class T>
void add(float* total, float weight, const T* row, int64_t d) {
  const F w = broadcast(weight);
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES) store(total + j, fma(w, load(row + j), load(total + j)));
  if (j < d) store(total + j, fma(w, load(row + j, d - j), load(total + j)));
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

}  // namespace

void bank_scores_forward(const void* query, const void* bank, const int64_t* index,
                         const float* scale, float* scores, int64_t n, int64_t k, int64_t d,
                         int dtype, int bank_dtype, int threads) {
  const int64_t pieces = (k + PIECE - 1) / PIECE;
  with_types(dtype, bank_dtype, [&](auto* query_type, auto* bank_type) {
    const auto* q = static_cast<decltype(query_type)>(const_cast<void*>(query));
    const auto* rows = static_cast<decltype(bank_type)>(const_cast<void*>(bank));
    float* out = scores;  // clang 14 loses what a lambda in a parallel region captures twice
    const float t = *scale;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * k * d > PARALLEL)
    for (int64_t task = 0; task < n * pieces; ++task) {
      const int64_t i = task / pieces, first = task % pieces * PIECE, at = i * k + first;
      const Scratch memory(size_t(padded(d)) * 4);
      float* x = memory.as<float>();
      widen(q + i * d, x, d);
      for_rows(rows, index + at, std::min(PIECE, k - first), d,
               [&](int64_t c, const auto* row) { out[at + c] = t * dot(x, row, d); });
    }
  });
}

void bank_scores_backward(const float* grad, const void* query, const void* bank,
                          const int64_t* index, const float* scale, void* grad_query,
                          float* grad_scale, int64_t n, int64_t k, int64_t d, int dtype,
                          int bank_dtype, int threads) {
  const int64_t pieces = std::max<int64_t>(1, (k + PIECE - 1) / PIECE), width = padded(d);
  const Scratch memory(size_t(n * pieces * width) * 4);
  float* sums = memory.as<float>();  // (N, pieces, width): Σ_k g_nk bank[index_nk]
  std::vector<double> products(size_t(n), 0.0);
  with_types(dtype, bank_dtype, [&](auto* query_type, auto* bank_type) {
    using Q = decltype(query_type);
    const auto* q = static_cast<Q>(const_cast<void*>(query));
    const auto* rows = static_cast<decltype(bank_type)>(const_cast<void*>(bank));
    Q dq = static_cast<Q>(grad_query);
    const float* g = grad;  // as above
#pragma omp parallel num_threads(threads) if (n * k * d > PARALLEL)
    {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < n * pieces; ++task) {
        const int64_t i = task / pieces, first = task % pieces * PIECE, at = i * k + first;
        float* total = sums + task * width;
        std::fill_n(total, width, 0.0f);
        for_rows(rows, index + at, std::min(PIECE, k - first), d,
                 [&](int64_t c, const auto* row) { add(total, g[at + c], row, d); });
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        float* total = sums + i * pieces * width;
        for (int64_t piece = 1; piece < pieces; ++piece) add(total, 1, total + piece * width, d);
        products[size_t(i)] = dot(total, q + i * d, d);
        for (int64_t j = 0; j < d; j += LANES)
          store(dq + i * d + j, load(total + j) * *scale, d - j);
      }
    }
  });
  double total = 0;
  for (double product : products) total += product;
  *grad_scale = float(total);
}

}  // namespace fastcl
