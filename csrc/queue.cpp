// Ring-buffer write of a batch of keys.
//
//   queue[(pointer + i) mod M] ← keys_i      in order: of more than M keys the last M remain
//   pointer ← (pointer + B) mod M
//
// Each key that remains is read once; at most two stretches, before and after the wrap-around.
// Plain version: fastcl/reference/queue.py. Triton twin: kernels/queue.py.
#include <algorithm>

#include "ops.h"

namespace fastcl {
namespace {

constexpr int64_t CHUNK = 1 << 15;

template <class Q, class K>
void copy(Q* queue, const K* keys, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 4 * CHUNK)
  for (int64_t chunk = 0; chunk < count; chunk += CHUNK) {
    const int64_t stop = std::min(chunk + CHUNK, count);
    if constexpr (std::is_same_v<Q, K>) {  // bits, so that a NaN keeps its payload
      std::memcpy(queue + chunk, keys + chunk, size_t(stop - chunk) * sizeof(Q));
    } else {
      for (int64_t k = chunk; k < stop; k += LANES)
        store(queue + k, load(keys + k, stop - k), stop - k);
    }
  }
}

}  // namespace

void queue_push(void* queue, int64_t* pointer, const void* keys, int64_t m, int64_t b, int64_t d,
                int queue_dtype, int key_dtype, int threads) {
  const int64_t first = std::max<int64_t>(b - m, 0), count = b - first;
  // Also a pointer outside [0, M) writes inside the queue.
  const int64_t start = ((*pointer % m + m) % m + first) % m;
  const int64_t before = std::min(count, m - start);  // keys before the wrap-around
  with_type(queue_dtype, [&](auto* q) {
    with_type(key_dtype, [&](auto* k) {
      auto* to = static_cast<decltype(q)>(queue);
      const auto* from = static_cast<decltype(k)>(const_cast<void*>(keys)) + first * d;
      copy(to + start * d, from, before * d, threads);
      copy(to, from + before * d, (count - before) * d, threads);
    });
  });
  *pointer = (start + count) % m;
}

}  // namespace fastcl
