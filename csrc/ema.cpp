// Exponential moving average of a list of tensors.
//
//   target ← m target + (1 − m) source
//
// The list is one range of numbers cut into chunks of equal size, whatever the tensors' sizes:
// each number is read once and written once, by any thread. Arithmetic is float32.
// Plain version: fastcl/reference/ema.py. Triton twin: kernels/ema.py.
#include <algorithm>

#include "ops.h"
#include "prefetch.h"

namespace fastcl {
namespace {

constexpr int64_t CHUNK = 1 << 16;

// Written from the end that is nearer, target + (1 − m)(source − target) or
// source − m (source − target): then m = 0 and m = 1 are exact, and equal weights stay as they are,
// which m target + (1 − m) source with rounded m and 1 − m would slowly move.
template <class T, class S>
void mix(T* target, const S* source, int64_t count, double momentum) {
  const bool near_target = momentum > 0.5;
  const F weight = broadcast(float(near_target ? 1 - momentum : -momentum));
  auto mixed = [&](F t, F s) { return fma(weight, s - t, near_target ? t : s); };
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
    prefetch<NEAR>(target + k + AHEAD), prefetch<NEAR>(source + k + AHEAD);
    store(target + k, mixed(load(target + k), load(source + k)));
  }
  if (k < count)
    store(target + k, mixed(load(target + k, count - k), load(source + k, count - k)), count - k);
}

}  // namespace

void ema_update(const std::vector<int64_t>& targets, const std::vector<int64_t>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& target_dtypes,
                const std::vector<int>& source_dtypes, double momentum, int threads) {
  const size_t count = sizes.size();
  std::vector<int64_t> start(count + 1, 0);  // of each tensor in the whole range
  for (size_t i = 0; i < count; ++i) start[i + 1] = start[i] + sizes[i];
  const int64_t total = start[count];
  std::vector<int64_t> sorted =
      targets;  // a tensor that is in the list twice moves twice, in order
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (total > CHUNK)
  for (int64_t chunk = 0; chunk < total; chunk += CHUNK) {
    const int64_t stop = std::min(chunk + CHUNK, total);
    int64_t at = chunk;
    size_t i = size_t(std::upper_bound(start.begin(), start.end(), at) - start.begin()) - 1;
    for (; at < stop; at = start[++i]) {
      const int64_t offset = at - start[i], length = std::min(start[i + 1], stop) - at;
      with_type(target_dtypes[i], [&](auto* t) {
        with_type(source_dtypes[i], [&](auto* s) {
          auto* target = reinterpret_cast<decltype(t)>(targets[i]) + offset;
          const auto* source = reinterpret_cast<decltype(s)>(sources[i]) + offset;
          mix(target, source, length, momentum);
        });
      });
    }
  }
}

}  // namespace fastcl
