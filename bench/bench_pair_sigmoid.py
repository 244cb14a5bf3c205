"""SigLIP's loss: pytest bench/bench_pair_sigmoid.py."""

from bench.regression import regressions

test_pair_sigmoid = regressions("pair_sigmoid")
