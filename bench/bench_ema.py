"""The momentum update of a ResNet-50: pytest bench/bench_ema.py."""

from bench.regression import regressions

test_ema = regressions("ema")
