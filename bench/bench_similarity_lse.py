"""CLIP, and InfoNCE against a queue: pytest bench/bench_similarity_lse.py."""

from bench.regression import regressions

test_similarity_lse = regressions("similarity_lse")
