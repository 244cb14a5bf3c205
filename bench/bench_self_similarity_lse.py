"""NT-Xent, SupCon and DCL: pytest bench/bench_self_similarity_lse.py."""

from bench.regression import regressions

test_self_similarity_lse = regressions("self_similarity_lse")
