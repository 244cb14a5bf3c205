"""InfoNCE with negatives of each query's own: pytest bench/bench_own_negatives.py."""

from bench.regression import regressions

test_own_negatives = regressions("own_negatives")
