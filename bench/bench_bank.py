"""Updates of a memory bank: pytest bench/bench_bank.py."""

from bench.regression import regressions

test_bank = regressions("bank")
