// Results below 2^-126 are zero while a NoSubnormals lives, in the thread that made it.
//
// The probabilities of a steep softmax are full of them, and so are their products. Each takes
// Intel's processors a hundred times as long as another number: CLIP's loss at a scale of 100 took
// fifty times as long as at 10. Operands are left alone: float16 is converted by way of them where
// there is no instruction for it.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastcl {

class NoSubnormals {
#if defined(__SSE__)
 public:
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_TO_ZERO); }
  ~NoSubnormals() { _mm_setcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;

 private:
  static constexpr unsigned FLUSH_TO_ZERO = 0x8000;
  unsigned before_;
#else
 public:
  NoSubnormals() {}  // so that none is "unused"
#endif
};

}  // namespace fastcl
