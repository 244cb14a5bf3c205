// InvaSpread's instance loss; the matrix is never stored.
//
// Rows r are 2N views, row r's partner is (r + N) mod 2N, m weighs the
// negatives (c ≠ r, partner).
//
//   s_rc   = t · ẑ_r·ẑ_c                                  c ≠ r
//   p_rc   = [c negative] m exp(s_rc) / D_r, or exp(s_rc) / D_r;   D_r makes
//   Σ_{c≠r} p_rc = 1 q_rc   = 1 − p_rc,   u_rc = p_rc / m loss_r = −log
//   p_r,partner − m Σ_negatives log(1 − u_rc) R_rc   = u_rc / (1 − u_rc) = p_rc
//   / (m − 1 + q_rc),   B_r = Σ_negatives R_rc G_rc   = p_rc (1 − m B_r) + m
//   R_rc = p_rc (1 − m (B_r − R_rc)) + m R_rc q_rc    on a negative
//          = −q_rc − m p_rc B_r on the partner
//   ∂/∂ẑ_r = t Σ_c g_r G_rc ẑ_c (+ t Σ_c g_c G_cr ẑ_c if columns are not
//   detached)
//
// q is never formed by a subtraction that cancels. Only the largest entry of a
// row can exceed ½; the first pass keeps the largest negative apart from the
// sum of the others, and the partner apart from both, so that the share of all
// but the largest, o_r, is that one's q. What exceeds ½ is treated by itself;
// vectors see only p ≤ ½ (or a little above: see ALONE). At τ = 0.01 scores
// differ by up to 200: o_r and R_rc are then beyond float and only their
// logarithms are kept.
//
// s is symmetric though p and G are not: a pair of blocks i < j is computed
// once for the rows of both. Matrix products of the full 2N × 2N: forward ½ for
// D, which u needs, and ½ for the sums of the logarithms; backward ½ for s, and
// ½ each for the gradients of either block's rows. Two and a half in all, with
// or without a gradient through the columns: with it the weight of a pair, g_r
// G_rc + g_c G_cr, serves both products; without it each product has its own.
// Memory O(N·D); the same bits for any number of threads.
// Plain version: fastcl/reference/instance_spread.py. Triton twin:
// kernels/instance_spread.py.
#include "matrix.h"
#include "spread_rows.h"
#include "tops.h"

namespace fastcl {
namespace {

// The shares of all rows; those of the padding are 0.
class AllShares {
 public:
  explicit AllShares(const Layout& layout)
      : padded_(layout.blocks() * layout.block), memory_(size_t(4 * padded_) * 4) {
    std::fill_n(memory_.as<float>(), 3 * padded_, 0.0f);
    std::fill_n(memory_.as<float>() + 3 * padded_, padded_, INF);
  }
  Shares operator+(int64_t first) const {
    float* at = memory_.as<float>();
    return Shares{at, at + padded_, at + 2 * padded_, at + 3 * padded_} + first;
  }
  // u = e^(s − log_whole); what is above `limit` is treated by itself.
  void set(int64_t i, double log_whole, double limit) const {
    const Shares x = *this + i;
    x.shift[0] = float(log_whole), x.factor[0] = float(std::exp(x.shift[0] - log_whole));
    // Below −80 the row has no ordinary negative in a bounded block, whose
    // scores are at least −BOUND.
    x.bounded[0] = log_whole < -80 ? 0 : float(std::exp(-log_whole));
    x.limit[0] = float(limit);
  }

 private:
  int64_t padded_;
  Scratch memory_;
};

struct Problem {
  Layout layout;
  double m, log_m;
  float scale;

  Problem(int64_t n, int64_t d, bool paired, bool normalize, double weight, float scale)
      : layout{n, d, block_rows(n, d), paired, normalize},
        m(weight),
        log_m(std::log(weight)),
        scale(scale) {}
  // The s of a negative whose p is ½.
  double half(double log_d) const { return log_d - log_m - LN2; }
  Pass pass() const { return {layout, layout, nullptr, nullptr, scale, true}; }
  // The column of row r's partner in block k where it is above the diagonal, or
  // −1.
  int64_t partner(int64_t r, const Block& k) const {
    const int64_t half = layout.n / 2, c = r + half - k.first;
    return r < half && c >= 0 && c < k.rows ? c : -1;
  }
};

// use(bounded, group, s, first row, first column, end of columns) for the
// groups of rows of a block pair, of whose negatives alone s is: own(row,
// partner, its s) takes each partner out before.
template <bool PAIRED, class Own, class Use>
void for_groups(const Problem& problem, const Pass& pass, const Block& q, const Block& k, float* s,
                Own own, Use use) {
  const bool bounded = pass.bounded(q, k);
  for_strips<PAIRED>(
      pass, q, k, s, false,
      [&](float* strip, int64_t r0, int64_t count, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t c = problem.partner(q.first + r0 + r, k);
          if (c < 0) continue;
          own(q.first + r0 + r, k.first + c, strip[r * W_ROW + c]);
          strip[r * W_ROW + c] = LEFT_OUT;
        }
        constexpr std::integral_constant<int, GROUP> six{};
        constexpr std::integral_constant<int, 1> one{};
        const auto groups = [&](auto bound) {
          in_groups(
              count, [&](int64_t r) { use(bound, six, strip + r * W_ROW, r0 + r, begin, end); },
              [&](int64_t r) { use(bound, one, strip + r * W_ROW, r0 + r, begin, end); });
        };
        if (bounded)
          groups(std::true_type{});
        else
          groups(std::false_type{});
      });
}

// f(i) for the rows of every block, in parallel.
template <class Function>
void for_rows(const Layout& layout, int threads, Function f) {
  in_order(layout.blocks(), threads, [&](int64_t b, int) {
    for (int64_t i = b * layout.block; i < b * layout.block + layout.rows(b); ++i) f(i);
  });
}

// work(pair, thread) for every pair of blocks, in parallel; then, in the turn
// of each block, into(pair, thread, whether the block is the columns').
template <class Work, class Into>
void for_pairs(const Layout& layout, int threads, Work work, Into into) {
  const Triangle triangle{layout.blocks()};
  Turns turns(layout.blocks());
  in_order(triangle.tasks(), threads, [&](int64_t task, int thread) {
    const BlockPair pair = triangle.pair(task);
    if (pair.i < 0) return;
    work(pair, thread);
    turns.wait(pair.i, pair.turn_i);
    into(pair, thread, false);
    if (pair.i != pair.j) {
      turns.next(pair.i);
      turns.wait(pair.j, pair.turn_j);
    }
    into(pair, thread, true);
    turns.next(pair.j);
  });
}

// log(e^a + e^b)
inline double log_add(double a, double b) {
  const double high = std::fmax(a, b);
  return std::isfinite(high) ? high + std::log1p(std::exp(std::fmin(a, b) - high)) : a + b;
}

template <class T>
void forward(const Problem& problem, const T* z, float* loss, float* log_d, float* log_o, float* b,
             float* log_large, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Layout& layout = problem.layout;
  const Pass pass = problem.pass();
  const double m = problem.m;
  const int64_t block = layout.block, padded = layout.blocks() * block;
  const Matrix<T> packed(layout, LEFT | RIGHT, z, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const auto of_rows = [&](int thread) { return workspaces[thread].sums; };
  const auto of_columns = [&](int thread) { return workspaces[thread].sums + 4 * BLOCK_MAX; };

  const Scratch memory(size_t(4 * padded + layout.n) * 4);
  const Tops tops = tops_in(memory.as<float>(), padded);
  float* own = memory.as<float>() + 4 * padded;  // (2N,) the partner's s
  clear(tops, padded, NO_MAXIMUM);
  for_pairs(
      layout, threads,
      [&](const BlockPair& pair, int thread) {
        const Block &q = packed[pair.i], &k = packed[pair.j];
        const Tops rows = tops_in(of_rows(thread), BLOCK_MAX);
        const Tops columns = tops_in(of_columns(thread), BLOCK_MAX);
        clear(rows, block, 0);
        clear(columns, block, pass.bounded(q, k) ? 0 : NO_MAXIMUM);
        for_groups<PAIRED>(
            problem, pass, q, k, workspaces[thread].s,
            [&](int64_t r, int64_t c, float s) { own[r] = own[c] = s; },
            [&](auto bound, auto group, const float* s, int64_t r, int64_t begin, int64_t end) {
              top_rows<group(), bound()>(s, begin, end, rows + r, columns);
            });
      },
      [&](const BlockPair& pair, int thread, bool columns) {
        const int64_t first = (columns ? pair.j : pair.i) * block;
        merge(tops + first, tops_in(columns ? of_columns(thread) : of_rows(thread), BLOCK_MAX),
              block);
      });

  const AllShares shares(layout);
  std::vector<double> losses(size_t(layout.n)), ratios(size_t(layout.n));
  for_rows(layout, threads, [&](int64_t i) {
    const Tops top = tops + i;
    const double largest = problem.log_m + top.reference[0] + std::log(double(top.top[0]));
    const double others = problem.log_m + top.others_reference[0] + std::log(double(top.others[0]));
    const double negatives = log_add(largest, others);
    double& row = losses[size_t(i)];
    row = log_add(0, negatives - own[i]);  // −log p_r,partner
    const double whole = own[i] + row;     // log D
    const bool negative_leads = largest > own[i];
    const double rest = negative_leads ? log_add(own[i], others) : negatives, o = rest - whole;
    const bool alone = negative_leads && o < std::log(ALONE);
    log_d[i] = float(whole), log_o[i] = float(o), log_large[i] = -INF;
    if (alone) {
      const double not_u = m == 1 ? o : std::log((std::exp(o) + (m - 1)) / m);  // log (1 − u)
      row -= m * not_u;
      log_large[i] = float(std::log1p(-std::exp(o)) - not_u - problem.log_m);
    }
    shares.set(i, whole, alone ? problem.half(whole) : INF);
  });

  for_pairs(
      layout, threads,
      [&](const BlockPair& pair, int thread) {
        const Block &q = packed[pair.i], &k = packed[pair.j];
        float *r = of_rows(thread), *c = of_columns(thread);
        const LogSums rows{r, r + BLOCK_MAX}, columns{c, c + BLOCK_MAX};
        std::fill_n(c, 2 * BLOCK_MAX, 0.0f);
        for_groups<PAIRED>(
            problem, pass, q, k, workspaces[thread].s, [](int64_t, int64_t, float) {},
            [&](auto bound, auto group, const float* s, int64_t r, int64_t begin, int64_t end) {
              const auto log_with = [&](auto unit) {
                log_rows<group(), bound(), unit()>(s, begin, end, shares + (q.first + r),
                                                   shares + k.first, rows + r, columns);
              };
              if (m >= 1)
                log_with(std::true_type{});
              else
                log_with(std::false_type{});
            });
      },
      [&](const BlockPair& pair, int thread, bool columns) {
        const int64_t b = columns ? pair.j : pair.i;
        const float* part = columns ? of_columns(thread) : of_rows(thread);
        for (int64_t r = 0; r < layout.rows(b); ++r) {
          losses[size_t(b * block + r)] += m * part[r];
          ratios[size_t(b * block + r)] += part[BLOCK_MAX + r];
        }
      });
  for (int64_t i = 0; i < layout.n; ++i)
    loss[i] = float(losses[size_t(i)]), b[i] = float(ratios[size_t(i)]);
}

// What exceeds ½, and partners: an element of a strip whose weights are formed
// one by one.
struct Single {
  int64_t row, column;  // in the strip, in the block
  float s;
  bool partner;
};

template <class T>
void backward(const Problem& problem, const float* grad, const T* z, const float* log_d,
              const float* log_o, const float* b, const float* log_large, T* grad_z,
              float* grad_scale, bool detach_columns, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Layout& layout = problem.layout;
  const Pass pass = problem.pass();
  const int64_t size = layout.sums_size(), padded = layout.blocks() * layout.block;
  const double m = problem.m;
  const Matrix<T> packed(layout, LEFT | RIGHT | VALUES, z, pass.scale, threads);
  // The columns' own weights, if they have some, lie where a mean would.
  const Workspaces workspaces(threads, PAIRED, detach_columns ? BLOCK_MAX * W_ROW : 0, 0, 0);
  const Scratch sums(size_t(layout.blocks() * size) * 4), slope_memory(size_t(3 * padded) * 4);
  const AllShares shares(layout);
  float *weight = slope_memory.as<float>(), *slope = weight + padded, *minus = slope + padded;
  const Slopes slopes{weight, slope, minus};
  std::fill_n(weight, 3 * padded, 0.0f);
  for_rows(layout, threads, [&](int64_t i) {
    const bool alone = log_large[i] != -INF;
    const double log_kappa = alone ? -std::fmax(0.0, log_large[i]) : 0, kappa = std::exp(log_kappa);
    const double kappa_b = kappa * b[i] + std::exp(log_large[i] + log_kappa);
    weight[i] = float(grad[i] * m * kappa), slope[i] = float(grad[i] * m * (kappa - m * kappa_b));
    minus[i] = float(-kappa);
    shares.set(i, log_d[i] + log_kappa, alone ? problem.half(log_d[i]) : INF);
  });
  // g_i G of an entry of row i.
  const auto weight_of = [&](int64_t i, float s, bool is_partner) {
    const double log_p = s + (is_partner ? 0 : problem.log_m) - log_d[i];
    const double p_large = std::exp(log_p + log_large[i]);  // p times the one large R
    double p = std::exp(log_p), q = 1 - p;
    const bool largest = is_partner ? p > 0.5 : s > (shares + i).limit[0];
    if (largest) q = std::exp(double(log_o[i])), p = 1 - q;
    if (is_partner) return float(grad[i] * (-q - m * (p * b[i] + p_large)));
    const double ratio = p / (m - 1 + q);
    if (largest) return float(grad[i] * (p * (1 - m * b[i]) + (m == 1 ? p : m * ratio * q)));
    return float(grad[i] * (p * (1 - m * (b[i] - ratio)) - m * p_large + m * ratio * q));
  };
  for_pairs(
      layout, threads,
      [&](const BlockPair& pair, int thread) {
        const Block &q = packed[pair.i], &k = packed[pair.j];
        const Workspace work = workspaces[thread];
        Workspace transposed = work;
        if (detach_columns) transposed.s = work.mean;
        const Shares column_shares = shares + k.first;
        const auto has_limit = [](float limit) { return limit < INF; };
        const bool limits =
            std::any_of(column_shares.limit, column_shares.limit + k.rows, has_limit);
        std::vector<Single> singles;
        for_strips<PAIRED>(
            pass, q, k, work.s, !PAIRED,
            [&](float* strip, int64_t r0, int64_t count, int64_t begin, int64_t end) {
              singles.clear();
              float* columns = transposed.s + (PAIRED ? 0 : r0 * W_ROW);
              for (int64_t r = 0; r < count; ++r) {
                const int64_t i = q.first + r0 + r, partner = problem.partner(i, k);
                float* s = strip + r * W_ROW;
                const Shares row = shares + i;
                if (partner >= 0) singles.push_back({r, partner, s[partner], true});
                if (limits || has_limit(row.limit[0]))
                  for (int64_t c = begin; c < k.rows; ++c)
                    if (s[c] > std::min(row.limit[0], column_shares.limit[c]) && c != partner)
                      singles.push_back({r, c, s[c], false});
                const auto weigh = [&](auto bounded, auto detach) {
                  weigh_row<bounded(), detach()>(s, begin, end, row, column_shares, slopes + i,
                                                 slopes + k.first, s, columns + r * W_ROW);
                };
                if (pass.bounded(q, k))
                  detach_columns ? weigh(std::true_type{}, std::true_type{})
                                 : weigh(std::true_type{}, std::false_type{});
                else
                  detach_columns ? weigh(std::false_type{}, std::true_type{})
                                 : weigh(std::false_type{}, std::false_type{});
              }
              for (const Single& x : singles) {
                const float w = weight_of(q.first + r0 + x.row, x.s, x.partner);
                const float h = weight_of(k.first + x.column, x.s, x.partner);
                strip[x.row * W_ROW + x.column] = detach_columns ? w : w + h;
                if (detach_columns) columns[x.row * W_ROW + x.column] = h;
              }
              keep_weights<PAIRED>(q, k, work, strip, r0, count, begin, end, true, false);
              keep_weights<PAIRED>(q, k, work, detach_columns ? columns : strip, r0, count, begin,
                                   end, false, true);
            });
      },
      [&](const BlockPair& pair, int thread, bool columns) {
        const Block &q = packed[pair.i], &k = packed[pair.j];
        Workspace work = workspaces[thread];
        if (!columns)
          return times_keys<PAIRED>(pass, q, k, work, sums.as<float>() + pair.i * size,
                                    pair.turn_i > 0);
        if (detach_columns) work.s = work.mean;
        times_queries<PAIRED>(pass, q, k, work, sums.as<float>() + pair.j * size,
                              pair.turn_j > 0 || pair.i == pair.j);
      });
  // The scale's gradient is that of the rows alone, half of both.
  const double total = finish(layout, z, sums.as<float>(), problem.scale, grad_z, threads);
  *grad_scale = float(detach_columns ? total : total / 2);
}

}  // namespace

void instance_spread_forward(const void* z, const float* scale, float* loss, float* log_d,
                             float* log_o, float* b, float* log_large, int64_t n, int64_t d,
                             double negative_weight, bool normalize, int dtype, int threads) {
  threads = threads_for(2 * n * n * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem problem(n, d, is_paired<T>(), normalize, negative_weight, *scale);
    forward<T>(problem, static_cast<const T*>(z), loss, log_d, log_o, b, log_large, threads);
  });
}

void instance_spread_backward(const float* grad, const void* z, const float* scale,
                              const float* log_d, const float* log_o, const float* b,
                              const float* log_large, void* grad_z, float* grad_scale, int64_t n,
                              int64_t d, double negative_weight, bool normalize,
                              bool detach_columns, int dtype, int threads) {
  threads = threads_for(3 * n * n * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem problem(n, d, is_paired<T>(), normalize, negative_weight, *scale);
    backward<T>(problem, grad, static_cast<const T*>(z), log_d, log_o, b, log_large,
                static_cast<T*>(grad_z), grad_scale, detach_columns, threads);
  });
}

}  // namespace fastcl
