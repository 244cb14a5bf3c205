// InvaSpread's instance loss; the matrix is never stored.
//
// Rows r are 2N views, row r's partner is (r + N) mod 2N, m weighs the negatives (c ≠ r, partner).
//
//   s_rc   = t · ẑ_r·ẑ_c + [c negative] log m            c ≠ r
//   p_rc   = exp(s_rc) / D_r,   D_r = Σ_{c≠r} exp s_rc,   q_rc = 1 − p_rc
//   loss_r = −log p_r,partner − m Σ_negatives log(1 − p_rc / m)
//   R_rc   = p_rc / (m − 1 + q_rc),   B_r = Σ_negatives R_rc
//   G_rc   = p_rc (1 − m (B_r − R_rc)) + m R_rc q_rc      on a negative
//          = −q_rc − m p_rc B_r                           on the partner
//   ∂/∂ẑ_r = t Σ_c g_r G_rc ẑ_c (+ t Σ_c g_c G_cr ẑ_c if columns are not detached)
//
// q is never formed by a subtraction that cancels. Only the largest entry of a row can exceed ½;
// the first pass keeps that maximum apart from the sum of the others, whose share o_r of D_r is its
// q.
// The few entries that are special (a row's partner, an entry above ½) are taken out of the strip
// and treated one by one; vectors see only p ≤ ½.
// Two matrix products forward, two backward (three with a gradient to the columns).
// Plain version: fastcl/reference/instance_spread.py. Triton twin: kernels/instance_spread.py.
#include <numeric>

#include "matrix.h"

namespace fastcl {
namespace {

// −log(1 − u) / u for 0 ≤ u ≤ ½, to one unit in the last place.
inline F log1m_over(F u) {
  F y = broadcast(2.2109091f);
  y = fma(y, u, broadcast(-3.7502012f));
  y = fma(y, u, broadcast(3.3168404f));
  y = fma(y, u, broadcast(-1.4047033f));
  y = fma(y, u, broadcast(5.9291500e-1f));
  y = fma(y, u, broadcast(8.3675116e-2f));
  y = fma(y, u, broadcast(2.0939066e-1f));
  y = fma(y, u, broadcast(2.4938691e-1f));
  y = fma(y, u, broadcast(3.3335370e-1f));
  y = fma(y, u, broadcast(4.9999973e-1f));
  return fma(y, u, broadcast(1.0f));
}

struct Problem {
  Layout layout;
  std::vector<int64_t> ids;  // 0, 1, …: a row meets itself nowhere
  float m, log_m, scale;

  Problem(int64_t n, int64_t d, bool paired, bool normalize, double weight, float scale)
      : layout{n, d, block_rows(n, d), paired, normalize},
        ids(size_t(n)),
        m(float(weight)),
        log_m(float(std::log(weight))),
        scale(scale) {
    std::iota(ids.begin(), ids.end(), 0);
  }
  Pass pass() const { return {layout, layout, ids.data(), ids.data(), scale, false}; }
  // The column of row r's partner in block k, or −1.
  int64_t partner(int64_t r, const Block& k) const {
    const int64_t half = layout.n / 2, c = (r < half ? r + half : r - half) - k.first;
    return c >= 0 && c < k.rows ? c : -1;
  }
};

// Σ_c exp(s_c) = e^top (1 + others): the largest entry counts as the 1.
struct Top {
  float top = NO_MAXIMUM, others = 0;
  bool any = false;

  void add(const Top& x) {
    if (!x.any) return;
    if (!any) {
      *this = x;
    } else if (x.top > top) {
      others = x.others + (1 + others) * std::exp(top - x.top), top = x.top;
    } else {
      others += (1 + x.others) * std::exp(x.top - top);
    }
  }
  double log_sum() const { return top + std::log1p(double(others)); }
  float o() const { return others / (1 + others); }
};

// A row of a strip: s, with log m added to the negatives.
Top top_of(float* s, int64_t begin, int64_t end, int64_t partner, float log_m) {
  if (partner >= 0) s[partner] -= log_m;
  F highest = broadcast(NO_MAXIMUM);
  for (int64_t c = begin; c < end; c += LANES) highest = max(highest, load(s + c));
  const float top = max(highest);
  Top result;
  if (!(top > NO_MAXIMUM) && top == top) return result;
  F others{}, ties{};
  for (int64_t c = begin; c < end; c += LANES) {
    const F x = load(s + c);
    others += x == top ? F{} : exp(x - top);
    ties += x == top ? broadcast(1.0f) : F{};
  }
  result.top = top + log_m, result.others = sum(others) + (sum(ties) - 1), result.any = true;
  return result;
}

// What backward needs of a row, and the parts of its loss.
struct Row {
  float top = 0, inverse = 0, o = 0;  // p = exp(s − top) · inverse
  float b_small = 0, b_large = 0;     // B: the negatives up to ½, the one above it
  double loss = 0;
};

// use(p of a vector, its place) for the ordinary negatives of a row, and single(p, q, is partner,
// place, s − top) for its partner and an entry above ½, whose place in the strip is cleared.
template <class Use, class Single>
void for_entries(float* s, int64_t begin, int64_t end, int64_t partner, float log_m, const Row& row,
                 Use use, Single single) {
  const float shift = log_m - row.top;  // exact enough: s − top is of the size of log p
  int64_t special[2] = {partner, -1};
  if (row.o < 0.5f) {  // one entry may exceed ½: the one that is the maximum
    const float limit = std::log(0.5f / row.inverse) - shift;
    for (int64_t c = begin; c < end; ++c)
      if (s[c] > limit && c != partner) special[1] = c;
  }
  for (int64_t c : special) {
    if (c < 0) continue;
    const float own = c == partner ? -row.top : shift;
    const float p = std::exp(s[c] + own) * row.inverse;
    single(p > 0.5f ? 1 - row.o : p, p > 0.5f ? row.o : 1 - p, c == partner, c, s[c] + own);
    s[c] = LEFT_OUT;
  }
  const F offset = broadcast(shift), inverse = broadcast(row.inverse);
  for (int64_t c = begin; c < end; c += LANES) use(exp(load(s + c) + offset) * inverse, c);
}

template <bool PAIRED, class Use>
void for_rows(const Problem& problem, const Pass& pass, const Block& q, const Block& k, float* s,
              bool all, Use use) {
  for_strips<PAIRED>(
      pass, q, k, s, all, [&](float* strip, int64_t r0, int64_t count, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < count; ++r)
          use(strip + r * W_ROW, r0 + r, begin, end, problem.partner(q.first + r0 + r, k));
      });
}

template <class T>
void forward(const Problem& problem, const T* z, float* loss, float* log_d, float* o,
             float* b_small, float* b_large, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Layout& layout = problem.layout;
  const Pass pass = problem.pass();
  const Matrix<T> packed(layout, LEFT | RIGHT, z, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const float m = problem.m;
  // A block of rows is one task, so that its columns come in order.
  in_order(layout.blocks(), threads, [&](int64_t b, int thread) {
    const Block& q = packed[b];
    const Workspace work = workspaces[thread];
    std::vector<Top> tops(size_t(q.rows));
    for (int64_t j = 0; j < layout.blocks(); ++j)
      for_rows<PAIRED>(problem, pass, q, packed[j], work.s, false,
                       [&](float* s, int64_t r, int64_t begin, int64_t end, int64_t partner) {
                         tops[size_t(r)].add(top_of(s, begin, end, partner, problem.log_m));
                       });
    std::vector<Row> rows(size_t(q.rows));
    for (int64_t r = 0; r < q.rows; ++r) {
      const Top& top = tops[size_t(r)];
      rows[size_t(r)].top = top.top, rows[size_t(r)].inverse = 1 / (1 + top.others);
      rows[size_t(r)].o = top.o();
    }
    for (int64_t j = 0; j < layout.blocks(); ++j)
      for_rows<PAIRED>(problem, pass, q, packed[j], work.s, false,
                       [&](float* s, int64_t r, int64_t begin, int64_t end, int64_t partner) {
                         Row& row = rows[size_t(r)];
                         F logs{}, ratios{};
                         for_entries(
                             s, begin, end, partner, problem.log_m, row,
                             [&](F p, int64_t) {
                               if (m >= 1) {
                                 const F u = p * (1 / m);
                                 logs = fma(u, log1m_over(u), logs);
                               } else {
                                 for (int i = 0; i < LANES; ++i) logs[i] -= std::log1p(-p[i] / m);
                               }
                               ratios += p / (m - p);
                             },
                             [&](float p, float not_p, bool is_partner, int64_t, float exponent) {
                               if (is_partner) {
                                 row.loss -= p > 0.5f ? std::log1p(-double(row.o))
                                                      : exponent + std::log(double(row.inverse));
                                 return;
                               }
                               row.loss -= double(m) * std::log((not_p + (double(m) - 1)) / m);
                               row.b_large = p / (m - 1 + not_p);
                             });
                         row.loss += double(m) * sum(logs);
                         row.b_small += sum(ratios);
                       });
    for (int64_t r = 0; r < q.rows; ++r) {
      const Row& row = rows[size_t(r)];
      const int64_t i = q.first + r;
      loss[i] = float(row.loss), o[i] = row.o;
      log_d[i] = float(tops[size_t(r)].log_sum());
      b_small[i] = row.b_small, b_large[i] = row.b_large;
    }
  });
}

template <class T>
void backward(const Problem& problem, const float* grad, const T* z, const float* log_d,
              const float* o, const float* b_small, const float* b_large, T* grad_z,
              float* grad_scale, bool detach_columns, int threads) {
  constexpr bool PAIRED = is_paired<T>();
  const Layout& layout = problem.layout;
  const Pass pass = problem.pass();
  const Rectangle rectangle{layout.blocks(), layout.blocks()};
  const Matrix<T> packed(layout, LEFT | RIGHT | VALUES, z, pass.scale, threads);
  const Workspaces workspaces(threads, PAIRED, 0, 0, 0);
  const int64_t size = layout.sums_size();
  const Scratch of_rows(size_t(layout.blocks() * size) * 4);
  const Scratch of_columns(size_t(detach_columns ? 0 : layout.blocks() * size) * 4);
  Turns row_turns(layout.blocks()), column_turns(layout.blocks());
  const float m = problem.m;
  in_order(rectangle.tasks(), threads, [&](int64_t task, int thread) {
    const BlockPair pair = rectangle.pair(task);
    const Block &q = packed[pair.i], &k = packed[pair.j];
    const Workspace work = workspaces[thread];
    for_strips<PAIRED>(
        pass, q, k, work.s, !PAIRED,
        [&](float* strip, int64_t r0, int64_t count, int64_t begin, int64_t end) {
          for (int64_t r = 0; r < count; ++r) {
            const int64_t i = q.first + r0 + r;
            float* s = strip + r * W_ROW;
            Row row;
            row.top = log_d[i], row.inverse = 1;
            row.o = o[i];
            const float g = grad[i], small = b_small[i], large = b_large[i];
            struct {
              int64_t place = -1;
              float weight = 0;
            } single[2];
            const auto entry = [&](float p, float not_p, bool is_partner, int64_t c, float) {
              const float ratio = p / (m - 1 + not_p);
              const float others = large > 0 ? small : small - ratio;
              single[is_partner] = {c, is_partner ? -not_p - m * p * (small + large)
                                                  : p * (1 - m * others) + m * ratio * not_p};
            };
            for_entries(
                s, begin, end, problem.partner(i, k), problem.log_m, row,
                [&](F p, int64_t c) {
                  const F ratio = p / (m - p);
                  const F weight =
                      p * (1.0f - m * (small + large - ratio)) + m * ratio * (1.0f - p);
                  store(s + c, weight * g);
                },
                entry);
            for (const auto& [place, weight] : single)
              if (place >= 0) s[place] = weight * g;
          }
          keep_weights<PAIRED>(q, k, work, strip, r0, count, begin, end, true, !detach_columns);
        });
    row_turns.wait(pair.i, pair.turn_i);
    times_keys<PAIRED>(pass, q, k, work, of_rows.as<float>() + pair.i * size, pair.turn_i > 0);
    row_turns.next(pair.i);
    if (detach_columns) return;
    column_turns.wait(pair.j, pair.turn_j);
    times_queries<PAIRED>(pass, q, k, work, of_columns.as<float>() + pair.j * size,
                          pair.turn_j > 0);
    column_turns.next(pair.j);
  });
  // The scale's gradient is that of the rows alone.
  float* du = of_rows.as<float>();
  *grad_scale = float(finish(layout, z, du, problem.scale, static_cast<T*>(nullptr), threads));
  if (!detach_columns)
    for (int64_t at = 0; at < layout.blocks() * size; ++at) du[at] += of_columns.as<float>()[at];
  finish(layout, z, du, problem.scale, grad_z, threads);
}

}  // namespace

void instance_spread_forward(const void* z, const float* scale, float* loss, float* log_d, float* o,
                             float* b_small, float* b_large, int64_t n, int64_t d,
                             double negative_weight, bool normalize, int dtype, int threads) {
  threads = threads_for(2 * n * n * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem problem(n, d, is_paired<T>(), normalize, negative_weight, *scale);
    forward<T>(problem, static_cast<const T*>(z), loss, log_d, o, b_small, b_large, threads);
  });
}

void instance_spread_backward(const float* grad, const void* z, const float* scale,
                              const float* log_d, const float* o, const float* b_small,
                              const float* b_large, void* grad_z, float* grad_scale, int64_t n,
                              int64_t d, double negative_weight, bool normalize,
                              bool detach_columns, int dtype, int threads) {
  threads = threads_for(3 * n * n * d, threads);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem problem(n, d, is_paired<T>(), normalize, negative_weight, *scale);
    backward<T>(problem, grad, static_cast<const T*>(z), log_d, o, b_small, b_large,
                static_cast<T*>(grad_z), grad_scale, detach_columns, threads);
  });
}

}  // namespace fastcl
