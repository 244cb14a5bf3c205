"""Cross entropy against soft targets: pytest bench/bench_soft_cross_entropy.py."""

from bench.regression import regressions

test_soft_cross_entropy = regressions("soft_cross_entropy")
