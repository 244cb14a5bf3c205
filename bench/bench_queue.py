"""Writing a batch of keys into a queue: pytest bench/bench_queue.py."""

from bench.regression import regressions

test_queue = regressions("queue")
