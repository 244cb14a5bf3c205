"""fastcl against the alternatives and against the machine: `python -m bench`.

workloads.py  what is computed, by whom, and the least work that it takes
machine.py    what this machine is, and what it can do: multiply-adds and bytes per second
measure.py    correctness, then time, then memory
report.py     the table and the JSON file
plots.py      the pictures
"""
