"""The negative cosine loss: pytest bench/bench_cosine.py."""

from bench.regression import regressions

test_cosine = regressions("cosine")
