// DINO's cross entropy between views, the teacher's targets made on the fly.
//
//   y_ik   = softmax_k(t_T (teacher_ik − c_k))                    per sample n
//   Y_vk   = Σ_{i≠v} y_ik,   c_v its number of terms,   M = Σ_v c_v
//   loss   = 1/M Σ_v Σ_k Y_vk (lse_v − t_S x_vk),   lse_v = log Σ_k exp(t_S x_vk)
//   ∂loss/∂x_vk = t_S/M (c_v p_vk − Y_vk),          p_vk = exp(t_S x_vk − lse_v)
//
// A piece of the prototypes is the unit of work: its targets are made once, in L1, and meet the
// same piece of every student view. Each student logit is read once forward, read and written once
// backward; teachers' are read twice. No tensor of pairs, and no targets, are stored.
// Plain version: fastcl/reference/self_distillation.py. Triton twin: kernels/self_distillation.py.
#include <algorithm>
#include <numeric>

#include "ops.h"
#include "pages.h"
#include "scratch.h"
#include "soft_targets.h"
#include "subnormals.h"

namespace fastcl {
namespace {

constexpr int64_t PIECE = 2048;        // prototypes: the targets of three sums in half of L1
constexpr int64_t PARALLEL = 1 << 15;  // logits below which one thread is faster

struct Shape {
  int64_t students, teachers, n, k;
  int64_t pieces() const { return (k + PIECE - 1) / PIECE; }
  int64_t terms(int64_t v) const { return teachers - (v < teachers); }  // c_v
  double pairs() const { return double(students * teachers - std::min(students, teachers)); }
};

// t_T log2 e in two parts: rounded to one float it is another temperature, which sharp teachers
// show.
struct Sharpness {
  float high, low;
  explicit Sharpness(float scale)
      : high(float(scale * soft::LOG2E_)), low(float(scale * soft::LOG2E_ - double(high))) {}
  F minus(F centred, F top) const {
    return fma(centred, broadcast(low), fma_once(centred, broadcast(high), -top));
  }
};

// (max, Σ exp2) of t2 (x − c) over some k.
template <class T>
soft::Sums<double> teacher_sums(const T* x, const float* c, int64_t k, Sharpness t2) {
  F top = broadcast(soft::LOWEST), total{};
  for (int64_t j = 0; j < k; j += LANES) {
    const F centred = load(x + j, k - j) - load(c + j, k - j);
    F z = centred * t2.high;
    for (int64_t lane = k - j; lane < LANES; ++lane) z[lane] = soft::LOWEST;
    const F higher = max(top, z);
    z = t2.minus(centred, higher);
    for (int64_t lane = k - j; lane < LANES; ++lane) z[lane] = soft::LOWEST;
    total = fma(total, exp2(top - higher), exp2(z));
    top = higher;
  }
  return soft::across_lanes({top, total, F{}, F{}});
}

// The whole row of teacher i, sample n, in pieces.
template <class T>
soft::Sums<double> teacher_row(const T* x, const float* c, int64_t k, Sharpness t2) {
  auto row = teacher_sums(x, c, std::min(k, PIECE), t2);
  for (int64_t j = PIECE; j < k; j += PIECE)
    row = soft::together(row, teacher_sums(x + j, c + j, std::min(k - j, PIECE), t2));
  return row;
}

// Targets Y_v of one piece: every teacher's y, then the sum over the teachers other than v.
class Targets {
 public:
  Targets(const Shape& shape, float* memory) : shape_(shape), y_(memory) {}
  static int64_t size(const Shape& shape) { return (shape.teachers + 1) * PIECE; }

  template <class T>
  void make(const T* teacher, const float* c, const soft::Softmax* softmax, int64_t i, int64_t j,
            int64_t count, Sharpness t2) {
    for (int64_t v = 0; v < shape_.teachers; ++v) {
      const soft::Softmax s = softmax[v * shape_.n + i];
      const T* x = teacher + (v * shape_.n + i) * shape_.k + j;
      for (int64_t k = 0; k < count; k += LANES) {
        const F centred = load(x + k, count - k) - load(c + j + k, count - k);
        const F p = exp2(t2.minus(centred, broadcast(s.top)));
        store(y_ + v * PIECE + k, p * s.share, count - k);
      }
    }
    count_ = count;
  }
  const float* of(int64_t v) {
    float* total = y_ + shape_.teachers * PIECE;
    if (v > shape_.teachers) return total;  // the sum over all teachers is there already
    std::fill_n(total, count_, 0.0f);
    for (int64_t i = 0; i < shape_.teachers; ++i)
      for (int64_t k = 0; i != v && k < count_; k += LANES)
        store(total + k, load(total + k, count_ - k) + load(y_ + i * PIECE + k, count_ - k),
              count_ - k);
    return total;
  }

 private:
  const Shape& shape_;
  float* y_;
  int64_t count_ = 0;
};

}  // namespace

void self_distillation_forward(const void* student, const void* teacher, const float* center,
                               const float* student_scale, const float* teacher_scale, float* loss,
                               float* student_lse, float* teacher_lse, int64_t students,
                               int64_t teachers, int64_t n, int64_t k, int dtype, int threads) {
  const Shape shape{students, teachers, n, k};
  const int64_t pieces = shape.pieces(), rows = students * n;
  const float s2 = float(*student_scale * soft::LOG2E_);
  const Sharpness t2(*teacher_scale);
  const Scratch parts(sizeof(soft::Sums<double>) * size_t(rows * pieces));
  const Scratch softmaxes(sizeof(soft::Softmax) * size_t(teachers * n));
  auto* part = parts.as<soft::Sums<double>>();    // (S, N, pieces)
  auto* softmax = softmaxes.as<soft::Softmax>();  // (T, N)
  with_type(dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(const_cast<void*>(student));
    const auto* y = static_cast<decltype(type)>(const_cast<void*>(teacher));
#pragma omp parallel num_threads(threads) if (rows * k > PARALLEL)
    {
      const NoSubnormals fast;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < teachers * n; ++row) {
        const auto sums = teacher_row(y + row * k, center, k, t2);
        softmax[row] = soft::softmax_of(sums);
        teacher_lse[row] = float(soft::LN2_ * (sums.top + std::log2(sums.exponentials)));
      }
      const Scratch memory(size_t(Targets::size(shape)) * 4);
      Targets targets(shape, memory.as<float>());
#pragma omp for schedule(static)
      for (int64_t task = 0; task < n * pieces; ++task) {
        const int64_t i = task / pieces, j = task % pieces * PIECE;
        const int64_t count = std::min(PIECE, k - j);
        targets.make(y, center, softmax, i, j, count, t2);
        for (int64_t v = 0; v < students; ++v)
          part[(v * n + i) * pieces + task % pieces] =
              soft::sums_of(x + (v * n + i) * k + j, targets.of(v), count, s2);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (int64_t v = 0; v < students; ++v) {
          const auto* of_row = part + (v * n + i) * pieces;
          const auto row = std::accumulate(of_row + 1, of_row + pieces, *of_row, soft::together);
          const double log2_sum = std::log2(row.exponentials);
          total += row.mass * log2_sum - row.products;
          student_lse[v * n + i] = float(soft::LN2_ * (row.top + log2_sum));
        }
        loss[i] = float(soft::LN2_ * total / shape.pairs());
      }
    }
  });
}

void self_distillation_backward(const float* grad, const void* student, const void* teacher,
                                const float* center, const float* student_scale,
                                const float* teacher_scale, const float* student_lse,
                                const float* teacher_lse, void* grad_student, float* grad_scale,
                                int64_t students, int64_t teachers, int64_t n, int64_t k, int dtype,
                                int threads) {
  const Shape shape{students, teachers, n, k};
  const int64_t pieces = shape.pieces(), rows = students * n;
  const float s2 = float(*student_scale * soft::LOG2E_);
  const Sharpness t2(*teacher_scale);
  const Scratch parts(sizeof(double) * size_t(rows * pieces));
  const Scratch softmaxes(sizeof(soft::Softmax) * size_t(teachers * n + rows));
  auto* part = parts.as<double>();                                  // (S, N, pieces)
  auto* of_teacher = softmaxes.as<soft::Softmax>();                 // (T, N)
  auto* of_student = softmaxes.as<soft::Softmax>() + teachers * n;  // (S, N)
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    const auto* x = static_cast<T>(const_cast<void*>(student));
    const auto* y = static_cast<T>(const_cast<void*>(teacher));
    const int64_t bytes = rows * k * int64_t(sizeof *x);
    ask_for_huge_pages(grad_student, bytes);
    T dx = static_cast<T>(grad_student);
#pragma omp parallel num_threads(threads) if (rows * k > PARALLEL)
    {
      const NoSubnormals fast;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < teachers * n; ++row)
        of_teacher[row] = soft::softmax_of(teacher_lse[row],
                                           [&] { return teacher_row(y + row * k, center, k, t2); });
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row)
        of_student[row] = soft::softmax_of(
            student_lse[row], [&] { return soft::row_sums(x + row * k, x + row * k, k, s2); });
      const Scratch memory(size_t(Targets::size(shape)) * 4);
      Targets targets(shape, memory.as<float>());
#pragma omp for schedule(static)
      for (int64_t task = 0; task < n * pieces; ++task) {
        const int64_t i = task / pieces, j = task % pieces * PIECE;
        const int64_t count = std::min(PIECE, k - j);
        const float g = float(grad[i] / shape.pairs());
        targets.make(y, center, of_teacher, i, j, count, t2);
        for (int64_t v = 0; v < students; ++v) {
          const int64_t row = v * n + i, at = row * k + j;
          const soft::Softmax s = of_student[row];
          part[row * pieces + task % pieces] =
              double(g) * soft::gradient(x + at, targets.of(v), count, s2, s.top,
                                         s.share * float(shape.terms(v)), *student_scale * g,
                                         bytes > PAST_CACHES_BYTES, dx + at);
        }
      }
      after_stores_past_caches();
    }
  });
  *grad_scale = float(std::accumulate(part, part + rows * pieces, 0.0));
}

}  // namespace fastcl
