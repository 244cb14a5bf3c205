// Every kernel of csrc/, one block per operation. Pointers are to contiguous
// arrays; `threads` is the number of OpenMP threads; `dtype` is the storage
// type of the arrays passed as void*.
#pragma once

#include <cstdint>
#include <vector>

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

// ---- sinkhorn.cpp
void sinkhorn_forward(const void* scores,  // (N, K)
                      float* codes,        // (N, K)
                      int64_t n, int64_t k, double epsilon, int64_t iterations, int dtype,
                      int threads);

// ---- soft_cross_entropy.cpp
void soft_cross_entropy_forward(const void* logits,   // (N, K)
                                const void* targets,  // (N, K)
                                float scale,
                                double share,  // of a row in loss (); 0: a loss for each row
                                float* loss,   // (N,), or () with share
                                float* lse,    // (N,)
                                float* mass,   // (N,)
                                int64_t n, int64_t k, int dtype, int target_dtype, int threads);
void soft_cross_entropy_backward(const float* grad,    // (N,), or () with share
                                 const void* logits,   // (N, K)
                                 const void* targets,  // (N, K)
                                 float scale, double share,
                                 const float* lse,   // (N,)
                                 const float* mass,  // (N,)
                                 void* grad_logits,  // (N, K)
                                 float* grad_scale,  // ()
                                 int64_t n, int64_t k, int dtype, int target_dtype, int threads);

// ---- ema.cpp: one address, size and dtype per tensor
void ema_update(const std::vector<int64_t>& targets, const std::vector<int64_t>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& target_dtypes,
                const std::vector<int>& source_dtypes, double momentum, int threads);

// ---- queue.cpp
void queue_push(void* queue,       // (M, D)
                int64_t* pointer,  // (1,)
                const void* keys,  // (B, D)
                int64_t m, int64_t b, int64_t d, int queue_dtype, int key_dtype, int threads);

// ---- similarity_lse.cpp: scale: one float; ids: (N,), (M,) or null; any
// output may be null
void similarity_lse_forward(const void* query,  // (N, D)
                            const void* key,    // (M, D)
                            const float* scale, const int64_t* query_ids, const int64_t* key_ids,
                            float* row_lse,     // (N,)
                            float* column_lse,  // (M,)
                            int64_t n, int64_t m, int64_t d, bool normalize, int dtype,
                            int threads);
void similarity_lse_forward_with_mean(const void* query,  // (N, D)
                                      const void* key,    // (M, D)
                                      const float* scale, const int64_t* query_ids,
                                      const int64_t* key_ids,
                                      float* row_lse,   // (N,)
                                      float* mean_key,  // (N, D)
                                      int64_t n, int64_t m, int64_t d, bool normalize, int dtype,
                                      int threads);
void similarity_lse_backward(const float* grad_rows,     // (N,) or null, as row_lse
                             const float* grad_columns,  // (M,) or null, as column_lse
                             const void* query,          // (N, D)
                             const void* key,            // (M, D)
                             const float* scale, const int64_t* query_ids, const int64_t* key_ids,
                             const float* row_lse, const float* column_lse,
                             void* grad_query,   // (N, D)
                             void* grad_key,     // (M, D)
                             float* grad_scale,  // (1,)
                             int64_t n, int64_t m, int64_t d, bool normalize, int dtype,
                             int threads);

// ---- self_similarity_lse.cpp
void self_similarity_lse_forward(const void* z,  // (N, D)
                                 const float* scale, const int64_t* ids,
                                 float* lse,  // (N,)
                                 int64_t n, int64_t d, bool normalize, int dtype, int threads);
void self_similarity_lse_backward(const float* grad,  // (N,)
                                  const void* z,      // (N, D)
                                  const float* scale, const int64_t* ids,
                                  const float* lse,   // (N,)
                                  void* grad_z,       // (N, D)
                                  float* grad_scale,  // (1,)
                                  int64_t n, int64_t d, bool normalize, int dtype, int threads);

// ---- self_distillation.cpp
void self_distillation_forward(const void* student,         // (S, N, K)
                               const void* teacher,         // (T, N, K)
                               const float* center,         // (K,)
                               const float* student_scale,  // ()
                               const float* teacher_scale,  // ()
                               float* loss,                 // (N,)
                               float* student_lse,          // (S, N)
                               float* teacher_lse,          // (T, N)
                               int64_t students, int64_t teachers, int64_t n, int64_t k, int dtype,
                               int threads);
void self_distillation_backward(const float* grad,           // (N,)
                                const void* student,         // (S, N, K)
                                const void* teacher,         // (T, N, K)
                                const float* center,         // (K,)
                                const float* student_scale,  // ()
                                const float* teacher_scale,  // ()
                                const float* student_lse,    // (S, N)
                                const float* teacher_lse,    // (T, N)
                                void* grad_student,          // (S, N, K)
                                float* grad_scale,           // ()
                                int64_t students, int64_t teachers, int64_t n, int64_t k, int dtype,
                                int threads);

// ---- pair_sigmoid.cpp
// Losses and gradients of one pass: any of the outputs may be null, and so may
// grad (then it is 1).
void pair_sigmoid(const float* grad,   // (N,) or null
                  const void* image,   // (N, D)
                  const void* text,    // (N, D)
                  const float* scale,  // ()
                  const float* bias,   // ()
                  float* loss,         // (N,) or null
                  void* grad_image,    // (N, D) or null
                  void* grad_text,     // (N, D) or null
                  float* grad_scale,   // ()
                  float* grad_bias,    // ()
                  int64_t n, int64_t d, bool normalize, int dtype, int threads);

// ---- label_similarity.cpp
void label_similarity_forward(const void* z,          // (N, D)
                              const int64_t* labels,  // (N,)
                              float* mean,            // (N,)
                              int64_t* others,        // (N,)
                              float* rest,            // (N, D)
                              int64_t n, int64_t d, bool normalize, int dtype, int threads);
void label_similarity_backward(const float* grad,      // (N,)
                               const void* z,          // (N, D)
                               const int64_t* labels,  // (N,)
                               const float* rest,      // (N, D)
                               void* grad_z,           // (N, D)
                               int64_t n, int64_t d, bool normalize, int dtype, int threads);

// ---- instance_spread.cpp
void instance_spread_forward(const void* z,       // (2N, D)
                             const float* scale,  // ()
                             float* loss,         // (2N,)
                             float* log_d,        // (2N,)
                             float* o,            // (2N,)
                             float* b_small,      // (2N,)
                             float* b_large,      // (2N,)
                             int64_t n, int64_t d, double negative_weight, bool normalize,
                             int dtype, int threads);
void instance_spread_backward(const float* grad,     // (2N,)
                              const void* z,         // (2N, D)
                              const float* scale,    // ()
                              const float* log_d,    // (2N,)
                              const float* o,        // (2N,)
                              const float* b_small,  // (2N,)
                              const float* b_large,  // (2N,)
                              void* grad_z,          // (2N, D)
                              float* grad_scale,     // ()
                              int64_t n, int64_t d, double negative_weight, bool normalize,
                              bool detach_columns, int dtype, int threads);

// ---- bank_scores.cpp
void bank_scores_forward(const void* query,     // (N, D)
                         const void* bank,      // (M, D)
                         const int64_t* index,  // (N, K)
                         const float* scale,    // ()
                         float* scores,         // (N, K)
                         int64_t n, int64_t k, int64_t m, int64_t d, int dtype, int bank_dtype,
                         int threads);
void bank_scores_backward(const float* grad,     // (N, K)
                          const void* query,     // (N, D)
                          const void* bank,      // (M, D)
                          const int64_t* index,  // (N, K)
                          const float* scale,    // ()
                          void* grad_query,      // (N, D)
                          float* grad_scale,     // ()
                          int64_t n, int64_t k, int64_t m, int64_t d, int dtype, int bank_dtype,
                          int threads);

// ---- own_negatives.cpp
void own_negatives_forward(const void* query,      // (N, D)
                           const void* negatives,  // (N, K, D)
                           const float* scale,     // ()
                           float* lse,             // (N,)
                           int64_t n, int64_t k, int64_t d, bool normalize, int dtype, int threads);
void own_negatives_backward(const float* grad,      // (N,)
                            const void* query,      // (N, D)
                            const void* negatives,  // (N, K, D)
                            const float* scale,     // ()
                            const float* lse,       // (N,)
                            void* grad_query,       // (N, D) or null
                            void* grad_negatives,   // (N, K, D) or null
                            float* grad_scale,      // ()
                            int64_t n, int64_t k, int64_t d, bool normalize, int dtype,
                            int threads);

// ---- bank.cpp
void bank_update(void* bank,            // (M, D)
                 const int64_t* index,  // (B,)
                 const void* features,  // (B, D)
                 int64_t batch, int64_t d, double momentum, int bank_dtype, int dtype, int threads);

}  // namespace fastcl
