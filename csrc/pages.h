// Outputs so large that the memory they lie in costs more than computing them.
//
// Pages: a fresh array of more than a few megabytes costs a page fault per 4 KiB when it is first
// written. Where the system lets programs ask ("madvise", the usual setting), one fault per 2 MiB
// is enough. Nothing is changed but the cost; errors are ignored.
//
// Stores: a cache line is read before it is written, and pushes another one out. An output larger
// than the caches is written past them.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcl {

inline void ask_for_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + HUGE - 1) / HUGE * HUGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + uintptr_t(bytes)) / HUGE * HUGE;
  if (begin + HUGE < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)output, (void)bytes;
#endif
}

constexpr int64_t PAST_CACHES_BYTES = 16 << 20;  // a thread's share of the last cache, and more

// Numbers before the address is one that store_past_caches takes.
inline int64_t until_aligned(const float* x) {
  return int64_t((0 - reinterpret_cast<uintptr_t>(x)) % FASTCL_VECTOR_BYTES / sizeof(float));
}

// To an aligned address; call after_stores_past_caches() before another thread may read it.
inline void store_past_caches(float* x, F v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(x, __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(x, __m256(v));
#else
  store(x, v);
#endif
}
inline void after_stores_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace fastcl
