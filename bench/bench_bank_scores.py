"""Scores against a memory bank, and InstDisc's loss of them: pytest bench/bench_bank_scores.py."""

from bench.regression import regressions

test_bank_scores = regressions("bank_scores")
