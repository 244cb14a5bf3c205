"""fastcl against the alternatives and against the machine: `python -m bench`.

workloads.py  what is computed, by whom, and the least work that it takes; with
inputs.py     seeded inputs, plain.py the expressions that people write, peers.py other libraries
machine.py    what this machine is, and what it can do: multiply-adds and bytes per second
measure.py    correctness, then time, then memory (memory.py) of one call (calls.py)
scaling.py    how both grow: what to expect of the next size, and fitted exponents
report.py     the table and the JSON file
plots.py      the pictures
methods.py    `python -m bench methods`: every training method, one after the other
bench_*.py    regressions of each operation, for pytest-benchmark: pytest bench
"""
