// The similarity of each row to the mean of its label's other rows.
//
//   r_i    = Σ_{j≠i of i's label} ẑ_j,       n_i how many those are
//   mean_i = ẑ_i·r_i / n_i
//   dẑ_i   = w_i r_i + Σ_{j≠i of i's label} w_j ẑ_j,       w_i = g_i / n_i
//
// A thread takes one label at a time, whose rows it adds up in their order: O(N·D), the same bits
// for any number of threads.
// Plain version: fastcl/reference/label_similarity.py.
// Triton twin: kernels/label_similarity.py.
#include <algorithm>
#include <numeric>
#include <vector>

#include "ops.h"
#include "scratch.h"

namespace fastcl {
namespace {

constexpr float NORM_FLOOR = 1e-12f;
// With fewer numbers a second thread costs more than it does.
constexpr int64_t PARALLEL = 1 << 15;

// The rows in order of their labels, and where each label's rows begin (and the last end).
struct Groups {
  std::vector<int64_t> row, begin;

  Groups(const int64_t* label, int64_t n) : row(size_t(n)) {
    std::iota(row.begin(), row.end(), 0);
    std::stable_sort(row.begin(), row.end(),
                     [&](int64_t a, int64_t b) { return label[a] < label[b]; });
    for (size_t i = 0; i < row.size(); ++i)
      if (i == 0 || label[row[i]] != label[row[i - 1]]) begin.push_back(int64_t(i));
    begin.push_back(n);
  }
  int64_t count() const { return int64_t(begin.size()) - 1; }
};

template <class X, class Y>
float dot(const X* x, const Y* y, int64_t d) {
  F total{};
  for (int64_t k = 0; k < d; k += LANES) total = fma(load(x + k, d - k), load(y + k, d - k), total);
  return sum(total);
}

template <class X>
float inverse_norm(const X* x, int64_t d, bool normalize) {
  return normalize ? 1 / std::fmax(std::sqrt(dot(x, x, d)), NORM_FLOOR) : 1;
}

// total ← Σ a_i x_i over the rows of a group, a_i = factor(i) (kept in `factors`).
template <class X, class Factor>
void add_up(const X* x, const int64_t* row, int64_t count, int64_t d, float* total, float* factors,
            Factor factor) {
  std::fill_n(total, d, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const X* from = x + row[i] * d;
    const F a = broadcast(factors[row[i]] = factor(row[i]));
    for (int64_t k = 0; k < d; k += LANES)
      store(total + k, fma(load(from + k, d - k), a, load(total + k, d - k)), d - k);
  }
}

}  // namespace

void label_similarity_forward(const void* z, const int64_t* labels, float* mean, int64_t* others,
                              float* rest, int64_t n, int64_t d, bool normalize, int dtype,
                              int threads) {
  const Groups groups(labels, n);
  const Scratch memory(size_t(n) * 4);
  float* inverse = memory.as<float>();
  with_type(dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(const_cast<void*>(z));
    // clang 14 loses what a lambda in a parallel region captures twice
    const bool unit = normalize;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (n * d > PARALLEL)
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t* row = &groups.row[size_t(groups.begin[size_t(g)])];
      const int64_t count = groups.begin[size_t(g + 1)] - groups.begin[size_t(g)];
      const Scratch sums(size_t(d) * 4);
      float* total = sums.as<float>();
      add_up(x, row, count, d, total, inverse,
             [&](int64_t i) { return inverse_norm(x + i * d, d, unit); });
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = row[j], at = i * d;
        const F a = broadcast(-inverse[i]);
        for (int64_t k = 0; k < d; k += LANES)
          store(rest + at + k, fma(load(x + at + k, d - k), a, load(total + k, d - k)), d - k);
        others[i] = count - 1;
        mean[i] = dot(x + at, rest + at, d) * inverse[i] / float(std::max<int64_t>(count - 1, 1));
        // Alone, what is left of a sum of one is rounding.
        if (count == 1) std::fill_n(rest + at, d, 0.0f), mean[i] = 0;
      }
    }
  });
}

void label_similarity_backward(const float* grad, const void* z, const int64_t* labels,
                               const float* rest, void* grad_z, int64_t n, int64_t d,
                               bool normalize, int dtype, int threads) {
  const Groups groups(labels, n);
  const Scratch memory(size_t(2 * n) * 4);
  float *inverse = memory.as<float>(), *weight = inverse + n;  // weight: w_i / ‖z_i‖
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    const auto* x = static_cast<T>(const_cast<void*>(z));
    T dx = static_cast<T>(grad_z);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (n * d > PARALLEL)
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t* row = &groups.row[size_t(groups.begin[size_t(g)])];
      const int64_t count = groups.begin[size_t(g + 1)] - groups.begin[size_t(g)];
      const float each = 1 / float(std::max<int64_t>(count - 1, 1));
      const Scratch sums(size_t(2 * d) * 4);
      float *total = sums.as<float>(), *du = total + d;
      add_up(x, row, count, d, total, weight, [&](int64_t i) {
        inverse[i] = inverse_norm(x + i * d, d, normalize);
        return grad[i] * each * inverse[i];
      });
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = row[j], at = i * d;
        const F w = broadcast(grad[i] * each), own = broadcast(-weight[i]);
        for (int64_t k = 0; k < d; k += LANES) {
          const F of_others = fma(load(x + at + k, d - k), own, load(total + k, d - k));
          store(du + k, fma(load(rest + at + k, d - k), w, of_others), d - k);
        }
        if (count == 1) std::fill_n(du, d, 0.0f);
        // Through the normalisation; below the floor the norm is a constant.
        const bool projects = normalize && inverse[i] < 1 / NORM_FLOOR;
        const float along = projects ? dot(x + at, du, d) * inverse[i] * inverse[i] : 0;
        for (int64_t k = 0; k < d; k += LANES) {
          const F u = fma(load(x + at + k, d - k), broadcast(-along), load(du + k, d - k));
          store(dx + at + k, u * inverse[i], d - k);
        }
      }
    }
  });
}

}  // namespace fastcl
