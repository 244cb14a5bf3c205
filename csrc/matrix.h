// A packed matrix, and its way back: from the sums of a gradient to the gradient of the given rows.
#pragma once

#include <vector>

#include "block_pair.h"

namespace fastcl {

// Threads for `multiply_adds`: waking them costs some microseconds, so small work stays on one.
inline int threads_for(int64_t multiply_adds, int threads) {
  return multiply_adds < (1 << 21) ? 1 : threads;
}

// All blocks of a matrix, packed in parallel.
template <class T>
class Matrix {
 public:
  Matrix(const Layout& layout, int parts, const T* x, float scale, int threads)
      : size_(up(packed_size(layout, parts), 16)),
        memory_(size_t(layout.blocks() * size_ + threads * up(packing_size(layout), 16)) * 4),
        blocks_(size_t(layout.blocks())) {
    float* memory = memory_.template as<float>();
    float* work = memory + layout.blocks() * size_;
    in_order(layout.blocks(), threads, [&](int64_t b, int thread) {
      blocks_[size_t(b)] = pack_block(layout, parts, x, b, scale, memory + b * size_,
                                      work + thread * up(packing_size(layout), 16));
    });
  }
  const Block& operator[](int64_t b) const { return blocks_[size_t(b)]; }

 private:
  int64_t size_;
  Scratch memory_;
  std::vector<Block> blocks_;
};

// The total of a block's rows or columns over all block pairs, and its log-sum-exp.
class Totals {
 public:
  explicit Totals(const Layout& layout)
      : padded_(layout.blocks() * layout.block), memory_(size_t(2 * padded_) * 4) {
    clear(all(), padded_);
  }
  Sums operator[](int64_t first) const { return all() + first; }

  void lse(float* out, int64_t n) const {
    const Sums total = all();
    for (int64_t i = 0; i < n; ++i) {
      const float l = total.sum[i];
      out[i] = l == 0 ? -INF : total.maximum[i] + std::log(l);
    }
  }

 private:
  Sums all() const { return {memory_.as<float>(), memory_.as<float>() + padded_}; }
  int64_t padded_;
  Scratch memory_;
};

// g_i and lse_i as the weights of W_ij = g_i exp(s_ij − lse_i).
class GradWeights {
 public:
  GradWeights(const Layout& layout, const float* grad, const float* lse)
      : padded_(layout.blocks() * layout.block), memory_(size_t(grad ? 3 * padded_ : 0) * 4) {
    if (!grad) return;
    float* out = memory_.as<float>();
    std::fill_n(out, 3 * padded_, 0.0f);
    for (int64_t i = 0; i < layout.n; ++i) {
      if (lse[i] == -INF) continue;  // a row with nothing in it: weight 0
      out[i] = grad[i], out[padded_ + i] = lse[i];
      // Below −80 the row has no pair in any bounded block, whose scores are at least −BOUND.
      out[2 * padded_ + i] = lse[i] < -80 ? 0 : grad[i] * std::exp(-lse[i]);
    }
  }
  Weights weights() const {
    const float* at = memory_.as<float>();
    return {at, at + padded_, at + 2 * padded_};
  }

 private:
  int64_t padded_;
  Scratch memory_;
};

// Writes the gradient of the given rows of block b, from du = W k̂ (panels, block, NR):
//   dx̂ = t du,   dx = (dx̂ − x̂ <x̂, dx̂>) / ‖x‖     the second term only where ‖x‖ ≥ 1e-12
// Returns Σ <x̂, du>, the block's part of the scale's gradient. `out` may be null.
template <class T>
inline double finish_block(const Layout& layout, const T* x, const float* du, float scale, T* out,
                           int64_t b) {
  double scale_part = 0;
  const int64_t d = layout.d;
  for (int64_t r = 0; r < layout.rows(b); ++r) {
    const T* row = x + (b * layout.block + r) * d;
    const float length = layout.normalize ? norm(row, d) : 1.0f;
    const float inverse = layout.normalize ? 1 / std::fmax(length, SMALLEST_NORM) : 1.0f;
    const auto at = [&](int64_t k) { return du + (k / NR * layout.block + r) * NR + k % NR; };
    F product{};
    for (int64_t k = 0; k < d; k += LANES)
      product = fma(load(row + k, d - k), load(at(k), d - k), product);
    const float along = sum(product) * inverse;
    scale_part += along;
    if (!out) continue;
    const bool projected = layout.normalize && !(length < SMALLEST_NORM);
    const F a = broadcast(scale * inverse), c = broadcast(projected ? -along * inverse : 0.0f);
    T* to = out + (b * layout.block + r) * d;
    for (int64_t k = 0; k < d; k += LANES)
      store(to + k, a * fma(c, load(row + k, d - k), load(at(k), d - k)), d - k);
  }
  return scale_part;
}

// finish_block for all blocks of du (blocks, panels, block, NR); Σ <x̂, du>, added up in order.
template <class T>
inline double finish(const Layout& layout, const T* x, const float* du, float scale, T* out,
                     int threads) {
  std::vector<double> parts(size_t(layout.blocks()));
  in_order(layout.blocks(), threads, [&](int64_t b, int) {
    parts[size_t(b)] = finish_block(layout, x, du + b * layout.sums_size(), scale, out, b);
  });
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

}  // namespace fastcl
