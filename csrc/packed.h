// Rows of a matrix, normalised and laid out in blocks for the products of gemm.h.
//
//   left    (chunks, block, NR)     words of x̂ along the features: A of the scores
//   right   (block / NR, words, NR) the same, transposed, times t: B of the scores
//   values  (panels, block, NR)     features along NR: B of the gradients (for floats: left itself)
//
// A word is a float, or (PAIRED, with bfloat16 instructions) two bfloat16 neighbours along the
// summed dimension. PAIRED keeps the given bfloat16 rows, times a power of two that makes their
// norm lie in [1, 2), so packing rounds nothing; the rest of the normalisation is a factor per row
// on the scores: x̂_i = factor_i · packed_i.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "ops.h"

namespace fastcl {

constexpr float SMALLEST_NORM = 1e-12f;  // torch.nn.functional.normalize's eps
constexpr int64_t BLOCK_STEP = 96;       // a multiple of MR and NR on every machine
constexpr int64_t BLOCK_MAX = 384;
constexpr int64_t DEPTH_MAX = 256;  // words of a score summed before the next rows are loaded

inline int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

inline int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 << 10);
  return bytes;
#else
  return 512 << 10;
#endif
}

// Rows in a block: B's part of the scores (2/5 of L2) and the block of weights (3/5) stay in L2,
// and there are enough blocks to share between threads. Never a function of the number of threads.
inline int64_t block_rows(int64_t n, int64_t d) {
  const int64_t depth = std::min(d, DEPTH_MAX), words = l2_bytes() / 4;
  int64_t most = BLOCK_MAX;
  while (most > BLOCK_STEP && (most * most * 5 > words * 3 || most * depth * 5 > words * 2))
    most -= BLOCK_STEP;
  return std::min(most, std::max(BLOCK_STEP, up((n + 11) / 12, BLOCK_STEP)));
}

template <class T>
constexpr bool is_paired() {
#if defined(__AVX512BF16__)
  return sizeof(T) == 2 && !std::is_same<T, Half>::value;
#else
  return false;
#endif
}

struct Layout {
  int64_t n, d, block;
  bool paired, normalize;

  int64_t blocks() const { return (n + block - 1) / block; }
  int64_t rows(int64_t b) const { return std::min(block, n - b * block); }
  int64_t words() const { return paired ? (d + 1) / 2 : d; }
  int64_t chunks() const { return (words() + NR - 1) / NR; }
  int64_t panels() const { return (d + NR - 1) / NR; }
  int64_t left_size() const { return chunks() * block * NR; }
  int64_t right_size() const { return words() * block; }
  int64_t values_size() const { return paired ? panels() * block / 2 * NR : 0; }
  int64_t sums_size() const {
    return panels() * block * NR;
  }  // a block's gradient, (panels, block, NR)
};

// What a block of rows is packed for.
enum Part : int { LEFT = 1, RIGHT = 2, VALUES = 4 };

struct Block {
  const float* left = nullptr;
  const float* right = nullptr;
  const float* values = nullptr;
  const float* factor = nullptr;        // (block,), PAIRED only
  const float* right_factor = nullptr;  // (block,) factor · t, PAIRED only
  float bound = 0;                      // the largest ‖x̂_i‖
  int64_t first = 0, rows = 0;
};

inline int64_t packed_size(const Layout& layout, int parts) {
  if (!layout.paired && (parts & VALUES)) parts |= LEFT;
  return (parts & LEFT ? layout.left_size() : 0) + (parts & RIGHT ? layout.right_size() : 0) +
         (parts & VALUES ? layout.values_size() : 0) + (layout.paired ? 2 * layout.block : 0);
}

// Words of NR rows that pack_block works on at a time.
inline int64_t packing_size(const Layout& layout) { return NR * layout.chunks() * NR; }

template <class T>
inline float norm(const T* x, int64_t d) {
  F even{}, odd{};
  int64_t k = 0;
  for (; k + 2 * LANES <= d; k += 2 * LANES) {
    const F a = load(x + k), b = load(x + k + LANES);
    even = fma(a, a, even), odd = fma(b, b, odd);
  }
  for (; k < d; k += LANES) {
    const F a = load(x + k, d - k);
    even = fma(a, a, even);
  }
  return std::sqrt(sum(even + odd));
}

typedef float Q __attribute__((vector_size(16)));

// Four words, each by its index in a (0 to 3) followed by b (4 to 7).
template <int... INDEX>
inline Q shuffle(Q a, Q b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, INDEX...);
#else
  typedef int32_t P __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, P{INDEX...});
#endif
}

// to (k, NR) = from (NR rows, `row` words apart) transposed, times scale when it is given.
template <bool SCALED>
inline void transpose(const float* from, int64_t row, int64_t words, float scale, float* to) {
  // 4 × 4 words at a time: quarter-line stores, no gathers.
  int64_t k = 0;
  for (; k + 4 <= words; k += 4)
    for (int c = 0; c < NR; c += 4) {
      Q r[4];
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&r[i], from + (c + i) * row + k, sizeof(Q));
        if (SCALED) r[i] *= scale;
      }
      const Q a = shuffle<0, 4, 1, 5>(r[0], r[1]);
      const Q b = shuffle<2, 6, 3, 7>(r[0], r[1]);
      const Q e = shuffle<0, 4, 1, 5>(r[2], r[3]);
      const Q f = shuffle<2, 6, 3, 7>(r[2], r[3]);
      const Q out[4] = {shuffle<0, 1, 4, 5>(a, e), shuffle<2, 3, 6, 7>(a, e),
                        shuffle<0, 1, 4, 5>(b, f), shuffle<2, 3, 6, 7>(b, f)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (k + i) * NR + c, &out[i], sizeof(Q));
    }
  for (; k < words; ++k)
    for (int c = 0; c < NR; ++c)
      to[k * NR + c] = SCALED ? from[c * row + k] * scale : from[c * row + k];
}

// Packs block b of x (n, d) into `memory`, with `work` for NR rows; scale = t.
template <class T>
inline Block pack_block(const Layout& layout, int parts, const T* x, int64_t b, float scale,
                        float* memory, float* work) {
  constexpr bool PAIRED = is_paired<T>();
  if (!PAIRED && (parts & VALUES)) parts |= LEFT;
  const int64_t d = layout.d, words = layout.words(), row_words = layout.chunks() * NR;
  const int64_t first = b * layout.block, rows = layout.rows(b), filled = up(rows, BLOCK_STEP);
  float* left = memory;
  float* right = left + (parts & LEFT ? layout.left_size() : 0);
  float* values = right + (parts & RIGHT ? layout.right_size() : 0);
  float* factor = values + (parts & VALUES ? layout.values_size() : 0);
  float* right_factor = factor + layout.block;
  float bound = 0;
  for (int64_t r0 = 0; r0 < filled; r0 += NR) {
    for (int64_t r = 0; r < NR; ++r) {
      float* row = work + r * row_words;
      if (PAIRED) factor[r0 + r] = right_factor[r0 + r] = 0;
      std::fill(row + (r0 + r < rows ? d / (PAIRED ? 2 : 1) : 0), row + row_words, 0.0f);
      if (r0 + r >= rows) continue;
      const T* from = x + (first + r0 + r) * d;
      const float length = norm(from, d);
      const float inverse = layout.normalize ? 1 / std::fmax(length, SMALLEST_NORM) : 1.0f;
      // fmax would hide a NaN.
      const float unit = length * inverse;
      if (unit > bound || unit != unit) bound = unit;
      if constexpr (PAIRED) {
        const bool ordinary = layout.normalize && length > 0 && length < INF;
        const float power = ordinary ? std::ldexp(1.0f, -std::max(std::ilogb(length), -100)) : 1.0f;
        factor[r0 + r] = inverse / power, right_factor[r0 + r] = inverse / power * scale;
        BFloat16* to = reinterpret_cast<BFloat16*>(row);
        for (int64_t k = 0; k < d; k += LANES) store(to + k, load(from + k, d - k) * power, d - k);
      } else {
        for (int64_t k = 0; k < d; k += LANES)
          store(row + k, load(from + k, d - k) * inverse, d - k);
      }
    }
    if (parts & LEFT)
      for (int64_t chunk = 0; chunk < layout.chunks(); ++chunk)
        for (int64_t r = 0; r < NR; ++r) {
          float* to = left + (chunk * layout.block + r0 + r) * NR;
          const float* from = work + r * row_words + chunk * NR;
          store(to, load(from)), store(to + LANES, load(from + LANES));
        }
    if (parts & RIGHT) transpose<!PAIRED>(work, row_words, words, scale, right + r0 * words);
    if (PAIRED && (parts & VALUES))
      for (int64_t panel = 0; panel < layout.panels(); ++panel)
        for (int64_t r = 0; r < NR; r += 2) {
          uint32_t pair[NR];
          uint16_t even[NR], odd[NR];
          const int64_t count = std::min<int64_t>(NR, row_words * 2 - panel * NR);
          std::memset(even, 0, sizeof even), std::memset(odd, 0, sizeof odd);
          const auto* halves = reinterpret_cast<const char*>(work + r * row_words) + panel * NR * 2;
          std::memcpy(even, halves, size_t(count) * 2);
          std::memcpy(odd, halves + row_words * 4, size_t(count) * 2);
          for (int c = 0; c < NR; ++c) pair[c] = even[c] | uint32_t(odd[c]) << 16;
          std::memcpy(values + (panel * layout.block + r0 + r) / 2 * NR, pair, sizeof pair);
        }
  }
  Block packed;
  packed.left = left, packed.right = right, packed.values = PAIRED ? values : left;
  packed.factor = factor, packed.right_factor = right_factor;
  packed.bound = bound, packed.first = first, packed.rows = rows;
  return packed;
}

}  // namespace fastcl
