// Registers the kernels with Python; a pointer argument arrives as the integer of data_ptr().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "ops.h"

namespace py = pybind11;

namespace {

template <class T>
struct Argument {
  using type = T;
  static T pass(T x) { return x; }
};
template <class T>
struct Argument<T*> {
  using type = uintptr_t;
  static T* pass(uintptr_t x) { return reinterpret_cast<T*>(x); }
};
template <class T>
struct Argument<const T&> {
  using type = const T&;
  static const T& pass(const T& x) { return x; }
};

template <class Result, class... A>
void def(py::module_& m, const char* name, Result (*kernel)(A...)) {
  m.def(name, [kernel](typename Argument<A>::type... a) {
    py::gil_scoped_release without_gil;
    return kernel(Argument<A>::pass(a)...);
  });
}

// The instruction sets that this processor and its operating system run, the fastest last.
py::list supported_isas() {
  py::list isas;
  isas.append("baseline");
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c =
      __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // clang 14 has no name for it
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // A product of bfloat16 pairs does the work of two multiply-adds. On AMD's processors it takes
  // the time of one; on Intel's that of four, so the kernels are twice as fast without it.
  const bool pays = __builtin_cpu_is("amd");
  if (avx2) isas.append("avx2");
  if (bf16 && !pays) isas.append("avx512_bf16");
  if (avx512) isas.append("avx512");
  if (bf16 && pays) isas.append("avx512_bf16");
#endif
  return isas;
}

}  // namespace

PYBIND11_MODULE(FASTCL_ISA, m) {
  using namespace fastcl;
  m.def("supported_isas", supported_isas);
  def(m, "cosine_forward", cosine_forward);
  def(m, "cosine_backward", cosine_backward);
  def(m, "sinkhorn_forward", sinkhorn_forward);
  def(m, "soft_cross_entropy_forward", soft_cross_entropy_forward);
  def(m, "soft_cross_entropy_backward", soft_cross_entropy_backward);
  def(m, "ema_update", ema_update);
  def(m, "queue_push", queue_push);
  def(m, "similarity_lse_forward", similarity_lse_forward);
  def(m, "similarity_lse_forward_with_mean", similarity_lse_forward_with_mean);
  def(m, "similarity_lse_backward", similarity_lse_backward);
  def(m, "self_similarity_lse_forward", self_similarity_lse_forward);
  def(m, "self_similarity_lse_backward", self_similarity_lse_backward);
  def(m, "label_similarity_forward", label_similarity_forward);
  def(m, "label_similarity_backward", label_similarity_backward);
  def(m, "pair_sigmoid", pair_sigmoid);
  def(m, "instance_spread_forward", instance_spread_forward);
  def(m, "instance_spread_backward", instance_spread_backward);
  def(m, "self_distillation_forward", self_distillation_forward);
  def(m, "self_distillation_backward", self_distillation_backward);
  def(m, "bank_scores_forward", bank_scores_forward);
  def(m, "bank_scores_backward", bank_scores_backward);
  def(m, "own_negatives_forward", own_negatives_forward);
  def(m, "own_negatives_backward", own_negatives_backward);
  def(m, "bank_update", bank_update);
}
