// Momentum update of rows of a memory bank.
//
//   bank[index_b] ← normalise(m · bank[index_b] + (1 − m) · x_b)
//
// Every row is made from the bank as it was; of equal indices the last one wins. Each row is read
// and written once.
// Plain version: fastcl/reference/bank.py. Triton twin: kernels/bank.py.
#include <cmath>
#include <vector>

#include "ops.h"

namespace fastcl {
namespace {

constexpr float NORM_FLOOR = 1e-12f;
constexpr int64_t ROWS_AHEAD = 8;

// The places in the batch that are the last with their index, from the end: a hash table of what
// has been seen, as sorting a batch of distinct indices takes longer than updating their rows.
std::vector<int64_t> last_places(const int64_t* index, int64_t batch) {
  int bits = 1;
  while (int64_t(1) << bits < 2 * batch) ++bits;
  const size_t mask = (size_t(1) << bits) - 1;
  std::vector<int64_t> table(mask + 1, -1), places;
  places.reserve(size_t(batch));
  for (int64_t b = batch - 1; b >= 0; --b) {
    size_t slot = size_t(uint64_t(index[b]) * 0x9E3779B97F4A7C15u >> (64 - bits));  // Fibonacci
    while (table[slot] >= 0 && table[slot] != index[b]) slot = (slot + 1) & mask;
    if (table[slot] < 0) table[slot] = index[b], places.push_back(b);
  }
  return places;
}

template <class B, class X>
void update_row(B* row, const X* x, int64_t d, double momentum) {
  const F m = broadcast(float(momentum)), rest = broadcast(float(1 - momentum));
  const auto moved = [&](int64_t j) {
    return fma(load(row + j, d - j), m, load(x + j, d - j) * rest);
  };
  F squares{};
  for (int64_t j = 0; j < d; j += LANES) squares = fma(moved(j), moved(j), squares);
  const F inverse = broadcast(1 / std::fmax(std::sqrt(sum(squares)), NORM_FLOOR));
  for (int64_t j = 0; j < d; j += LANES) store(row + j, moved(j) * inverse, d - j);
}

}  // namespace

void bank_update(void* bank, const int64_t* index, const void* features, int64_t batch, int64_t d,
                 double momentum, int bank_dtype, int dtype, int threads) {
  const std::vector<int64_t> places = last_places(index, batch);
  const int64_t count = int64_t(places.size());
  with_type(bank_dtype, [&](auto* bank_type) {
    with_type(dtype, [&](auto* type) {
      auto* rows = static_cast<decltype(bank_type)>(bank);
      const auto* x = static_cast<decltype(type)>(const_cast<void*>(features));
#pragma omp parallel for num_threads(threads) schedule(static) if (count * d > 16384)
      for (int64_t i = 0; i < count; ++i) {
        if (i + ROWS_AHEAD < count) {  // a random place of the bank
          const auto* next = rows + index[places[size_t(i + ROWS_AHEAD)]] * d;
          for (int64_t j = 0; j < d; j += 64 / int64_t(sizeof *next))
            __builtin_prefetch(next + j, 1);
        }
        const int64_t b = places[size_t(i)];
        update_row(rows + index[b] * d, x + b * d, d, momentum);
      }
    });
  });
}

}  // namespace fastcl
