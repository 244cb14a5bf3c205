// Huge pages for outputs that a kernel is about to fill.
//
// A fresh array of more than a few megabytes costs a page fault per 4 KiB when it is first
// written, often more than computing it. Where the system lets programs ask ("madvise", the usual
// setting), one fault per 2 MiB is enough. Nothing is changed but the cost; errors are ignored.
#pragma once

#include <cstdint>

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

}  // namespace fastcl
