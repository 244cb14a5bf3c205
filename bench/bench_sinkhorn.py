"""SwAV's codes: pytest bench/bench_sinkhorn.py."""

from bench.regression import regressions

test_sinkhorn = regressions("sinkhorn")
