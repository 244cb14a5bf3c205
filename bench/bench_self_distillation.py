"""DINO's loss, all pairs of views: pytest bench/bench_self_distillation.py."""

from bench.regression import regressions

test_self_distillation = regressions("self_distillation")
