// Every kernel of csrc/, one block per operation. Pointers are to contiguous arrays; `threads` is
// the number of OpenMP threads; `dtype` is the storage type of the arrays passed as void*.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastcl {

enum DType : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// Calls f with a null pointer of the storage type that dtype names.
template <class Function>
inline void with_type(int dtype, Function f) {
  switch (dtype) {
    case FLOAT16:
      return f(static_cast<Half*>(nullptr));
    case BFLOAT16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// ---- cosine.cpp
void cosine_forward(const void* prediction,  // (N, D)
                    const void* target,      // (N, D)
                    float* loss,             // (N,)
                    int64_t n, int64_t d, float eps, int dtype, int threads);
void cosine_backward(const float* grad,       // (N,)
                     const void* prediction,  // (N, D)
                     const void* target,      // (N, D)
                     void* grad_prediction,   // (N, D) or null
                     void* grad_target,       // (N, D) or null
                     int64_t n, int64_t d, float eps, int dtype, int threads);

}  // namespace fastcl
