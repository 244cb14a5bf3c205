// Balanced soft assignments by Sinkhorn's iterations.
//
//   u_k  = 1 / Σ_n exp(S_nk / ε) v_n        S (N, K): N samples, K prototypes; v = 1 at first
//   v_n  = 1 / Σ_k exp(S_nk / ε) u_k
//   Q_nk = exp(S_nk / ε) u_k v_n            after the last iteration: softmax_k(S/ε + log u_k)
//
// Only u and v are kept between sweeps, as u_k = a_k 2^−m_k with 1/√2 ≤ a_k < 2√2 and v_n ≈ 2^−r_n:
// m_k and r_n are whole numbers, with an exact sum, and nothing overflows or vanishes, whatever the
// scores:
//
// * The first sweep takes true (maximum, sum) pairs down the columns.
// * Afterwards Q's columns sum to 1, so y_nk = exp2(S_nk c − m_k − r_n) a_k ≤ 2 without looking for
//   a maximum: one exponential per score and sweep. A row whose sum is tiny is done again from its
//   own maximum. With R_n = Σ_k y_nk, a column's next sum is Σ_n y_nk / R_n ≥ 1 / K, because the
//   row sums of Q are at most K: it cannot vanish, and what y flushes to zero is below 2^−96 of it.
//
// Sweeps are made of blocks of rows, whose column sums are added in order: the same bits for any
// number of threads. iterations + 1 reads of S, one write of Q, O(K · blocks) memory.
// Plain version: fastcl/reference/sinkhorn.py. Triton twin: kernels/sinkhorn.py.
// Source: Caron et al. 2020, arXiv:2006.09882; Cuturi 2013, arXiv:1306.0895.
#include <omp.h>

#include <algorithm>

#include "ops.h"
#include "pages.h"
#include "prefetch.h"
#include "scratch.h"
#include "subnormals.h"

namespace fastcl {
namespace {

constexpr int64_t TILE = 8;  // rows that share one look at the columns' maxima
constexpr int GROUP = 4;     // rows that share one look at the columns' u and sums
constexpr int64_t MAX_BLOCKS = 128;
constexpr float LOWEST = -1e30f;  // below any score, and its products stay finite
constexpr float EXACT = 0x1p23f;  // whole numbers below it have whole sums

// log2 e / ε in two floats: at S/ε = 1000 the rounding of one would cost three digits of Q.
// Both are positive, so that a score of −∞ stays one.
struct Scale {
  float high, low;
  explicit Scale(double c) : high(float(c)) {
    if (high >= c) high = std::nextafter(high, 0.0f);
    low = float(c - high);
  }
};

// x c − reference; the difference is small where it matters, and there it is rounded once.
inline F exponent(F x, Scale c, F reference) {
  return fma(x, broadcast(c.low), fma_once(x, broadcast(c.high), -reference));
}

// x = fraction · 2^power, 1 ≤ fraction < 2
float fraction_of(float x, int* power) {
  const float f = std::frexp(x, power);
  *power -= 1;
  return 2 * f;
}

inline bool all_exact(const float* x, int64_t count) {
  return std::all_of(x, x + count, [](float x_i) { return std::fabs(x_i) < EXACT; });
}

// Down the columns of some rows: top_k = max_n S_nk c and total_k = Σ_n exp2(S_nk c − top_k).
template <class T>
void column_sums(const T* S, int64_t rows, int64_t k, Scale c, float* top, float* total) {
  for (int64_t j = 0; j < k; j += LANES) store(top + j, broadcast(LOWEST)), store(total + j, F{});
  for (int64_t i = 0; i < rows; i += TILE) {
    const int64_t tile = std::min(TILE, rows - i);
    for (int64_t j = 0; j < k; j += LANES) {
      const T* s = S + i * k + j;
      F x[TILE], highest = broadcast(LOWEST);
      for (int64_t r = 0; r < tile; ++r) {
        prefetch<NEAR>(s + (r + TILE) * k);
        x[r] = load(s + r * k, k - j), highest = max(highest, x[r]);
      }
      const F old = load(top + j), m = max(old, highest * c.high);
      F sum = load(total + j) * exp2(old - m);
      for (int64_t r = 0; r < tile; ++r) sum += exp2(exponent(x[r], c, m));
      store(top + j, m), store(total + j, sum);
    }
  }
}

// y_ik = exp2(S_ik c − m_k − r_i) a_k for ROWS rows, `row` floats apart, and their sums R_i. FAR is
// for m_k or r_i that are not EXACT, whose sum is kept in two floats, and for any score: without it
// a −∞, or an r_i far from its row's, comes out as an R_i of NaN, or of 2^127 and more.
template <bool FAR, int ROWS, class T>
void row_weights(const T* S, const float* m, const float* a, Scale c, const float* r, float* y,
                 int64_t row, int64_t k, float* R) {
  F total[ROWS];
  for (int i = 0; i < ROWS; ++i) total[i] = F{};
  const auto weigh = [&](int i, int64_t j, F s, F m_j, F a_j) {
    F power;
    if constexpr (FAR) {
      const F reference = m_j + r[i], of_r = reference - m_j;
      power = exp2(exponent(s, c, reference) - ((m_j - (reference - of_r)) + (r[i] - of_r)));
    } else {
      power = exp2_bounded(min(broadcast(127.0f), exponent(s, c, m_j + r[i])));
    }
    const F w = power * a_j;
    store(y + i * row + j, w);
    total[i] += w;
  };
  int64_t j = 0;
  for (; j + LANES <= k; j += LANES) {
    const F m_j = load(m + j), a_j = load(a + j);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      prefetch<NEAR>(S + (i + ROWS) * k + j);
      weigh(i, j, load(S + i * k + j), m_j, a_j);
    }
  }
  if (j < k)
    for (int i = 0; i < ROWS; ++i)
      weigh(i, j, load(S + i * k + j, k - j, FAR ? -INF : LOWEST), load(m + j), load(a + j));
  for (int i = 0; i < ROWS; ++i) R[i] = sum(total[i]);
}

template <class T>
float row_maximum(const T* S, const float* m, Scale c, int64_t k) {
  F top = broadcast(-INF);
  for (int64_t j = 0; j < k; j += LANES)
    top = max(top, exponent(load(S + j, k - j, -INF), c, load(m + j)));
  return max(top);
}

// q = v y
inline void write_row(const float* y, float v, int64_t k, bool past_caches, float* q) {
  int64_t j = 0;
  if (past_caches) {
    j = std::min(until_aligned(q), k);
    if (j > 0) store(q, load(y) * v, j);
    for (; j + LANES <= k; j += LANES) store_past_caches(q + j, load(y + j) * v);
  }
  for (; j < k; j += LANES) store(q + j, load(y + j, k - j) * v, k - j);
}

template <class T>
struct Sinkhorn {
  const T* S;  // (N, K)
  int64_t n, k;
  Scale c;  // log2 e / ε
  int threads;

  int64_t width = (k + 15) / 16 * 16;  // K, padded to the widest vector
  int64_t block =
      std::max<int64_t>(32, ((n + MAX_BLOCKS - 1) / MAX_BLOCKS + TILE - 1) / TILE * TILE);
  int64_t blocks = (n + block - 1) / block;

  Scratch memory{sizeof(float) * size_t(width * (2 + GROUP * threads + 2 * blocks) + n)};
  float* m = memory.as<float>();                 // (K,)
  float* a = m + width;                          // (K,): u_k = a_k 2^−m_k
  float* y = a + width;                          // (threads, GROUP, K): some rows
  float* partial = y + width * GROUP * threads;  // (blocks, 2, K) or (blocks, K): column sums
  float* r = partial + 2 * width * blocks;       // (N,): v_n ≈ 2^−r_n
  bool large = false;                            // some |m_k| is not EXACT

  // f(first row, number of rows, block, thread) for all blocks. A thread's blocks are neighbours,
  // and every other sweep takes them backwards: the last ones are then still in the cache.
  template <class Function>
  void sweep(bool backwards, Function f) {
#pragma omp parallel num_threads(threads)
    {
      const NoSubnormals fast;
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      const int64_t begin = blocks * thread / team, end = blocks * (thread + 1) / team;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = backwards ? begin + end - 1 - i : i;
        f(b * block, std::min(block, n - b * block), b, thread);
      }
    }
  }

  template <class Function>
  void for_columns(Function f) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < k; j += LANES) f(j);
  }

  // u_k ← factor_k 2^−reference_k, factors of any size
  void set_columns(int64_t j, F factor, F reference) {
    for (int64_t lane = 0; lane < std::min<int64_t>(LANES, k - j); ++lane) {
      int power;
      a[j + lane] = fraction_of(factor[lane], &power);
      const double exact = double(reference[lane]) - power;
      m[j + lane] = std::nearbyint(float(exact));
      if (m[j + lane] != exact) a[j + lane] *= float(std::exp2(m[j + lane] - exact));
    }
  }

  void start() {
    std::fill_n(m, width, 0.0f), std::fill_n(a, width, 1.0f);
    std::fill_n(r, n, 0.0f);
  }

  // u from v = 1
  void first_columns(bool backwards) {
    sweep(backwards, [&](int64_t row, int64_t rows, int64_t b, int64_t) {
      column_sums(S + row * k, rows, k, c, &partial[2 * b * width], &partial[(2 * b + 1) * width]);
    });
    for_columns([&](int64_t j) {
      F top = load(&partial[j]), total{};
      for (int64_t b = 1; b < blocks; ++b) top = max(top, load(&partial[2 * b * width + j]));
      for (int64_t b = 0; b < blocks; ++b) {
        const float* at = &partial[2 * b * width + j];
        total = fma(load(at + width), exp2(load(at) - top), total);
      }
      set_columns(j, 1.0f / total, top);
    });
    large = !all_exact(m, k);
  }

  // y (ROWS, K) of rows from i on, and their sums R, whose powers of two join r.
  template <int ROWS>
  void weigh(int64_t i, float* y_i, float* R) {
    const T* S_i = S + i * k;
    const bool far = large || !all_exact(r + i, ROWS);
    const auto weights = far ? row_weights<true, ROWS, T> : row_weights<false, ROWS, T>;
    weights(S_i, m, a, c, r + i, y_i, width, k, R);
    for (int of = 0; of < ROWS; ++of, ++i, S_i += k, y_i += width, ++R) {
      if (!(*R > 0x1p-30f && *R < 0x1p100f)) {  // also when R is NaN, which may then stay
        r[i] = std::nearbyint(row_maximum(S_i, m, c, k));
        row_weights<true, 1>(S_i, m, a, c, r + i, y_i, width, k, R);
      }
      int power;
      fraction_of(*R, &power);
      r[i] += float(power);
    }
  }

  // use(group, i, y, v) for the rows of a block in groups: y (group, K) of rows from i on, and the
  // v = 1 / R of each.
  template <class Use>
  void for_groups(int64_t row, int64_t rows, int64_t thread, Use use) {
    float* y_i = &y[thread * GROUP * width];
    const auto run = [&](auto group, int64_t i) {
      float v[group()];
      weigh<group()>(i, y_i, v);
      for (float& x : v) x = 1 / x;
      use(group, i, y_i, v);
    };
    int64_t i = row;
    for (; i + GROUP <= row + rows; i += GROUP) run(std::integral_constant<int, GROUP>{}, i);
    for (; i < row + rows; ++i) run(std::integral_constant<int, 1>{}, i);
  }

  // v from u and at once u from v
  void rows_and_columns(bool backwards) {
    sweep(backwards, [&](int64_t row, int64_t rows, int64_t b, int64_t thread) {
      float* C = &partial[b * width];
      std::fill_n(C, width, 0.0f);
      const auto add = [&](auto group, int64_t, const float* y_i, const float* v) {
        for (int64_t j = 0; j < k; j += LANES) {
          F total = load(C + j);
          for (int of = 0; of < group(); ++of)
            total = fma(load(y_i + of * width + j), broadcast(v[of]), total);
          store(C + j, total);
        }
      };
      for_groups(row, rows, thread, add);
    });
    for_columns([&](int64_t j) {
      F C{};
      for (int64_t b = 0; b < blocks; ++b) C += load(&partial[b * width + j]);
      set_columns(j, load(&a[j]) / C, load(&m[j]));
    });
    large = !all_exact(m, k);
  }

  void write_codes(bool backwards, float* codes) {
    const bool past_caches = n * k * int64_t(sizeof(float)) > PAST_CACHES_BYTES;
    sweep(backwards, [&](int64_t row, int64_t rows, int64_t, int64_t thread) {
      const auto write = [&](auto group, int64_t i, const float* y_i, const float* v) {
        for (int of = 0; of < group(); ++of)
          write_row(y_i + of * width, v[of], k, past_caches, codes + (i + of) * k);
      };
      for_groups(row, rows, thread, write);
      after_stores_past_caches();
    });
  }
};

}  // namespace

void sinkhorn_forward(const void* scores, float* codes, int64_t n, int64_t k, double epsilon,
                      int64_t iterations, int dtype, int threads) {
  if (n == 0 || k == 0) return;
  ask_for_huge_pages(codes, n * k * int64_t(sizeof(float)));
  with_type(dtype, [&](auto* type) {
    const auto* S = static_cast<decltype(type)>(const_cast<void*>(scores));
    Sinkhorn<std::remove_pointer_t<decltype(type)>> plan{
        S, n, k, Scale(1.44269504088896340736 / epsilon), n * k > 32768 ? threads : 1};
    plan.start();
    for (int64_t t = 0; t < iterations; ++t)
      t == 0 ? plan.first_columns(false) : plan.rows_and_columns(t % 2);
    plan.write_codes(iterations % 2, codes);
  });
}

}  // namespace fastcl
