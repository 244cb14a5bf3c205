"""Runs the kernels in Triton's interpreter; must come before triton is imported."""

import os
import sys

assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
    "tests/triton/interp needs its own process: TRITON_INTERPRET=1 pytest tests/triton/interp"
)
os.environ["TRITON_INTERPRET"] = "1"
