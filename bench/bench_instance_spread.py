"""InvaSpread's loss: pytest bench/bench_instance_spread.py."""

from bench.regression import regressions

test_instance_spread = regressions("instance_spread")
