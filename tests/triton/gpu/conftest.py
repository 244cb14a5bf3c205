"""Runs the kernels on a GPU, or on the CPU from Triton's own IR:

    python -m ttsem.sanitize pytest tests/triton/gpu

ttsem also reports, at the kernel's line, an access past a tensor's end, a race between program
instances and a value that nobody wrote.
"""

import os
from pathlib import Path

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET", "0") != "1", (
    "tests/triton/gpu needs its own process without TRITON_INTERPRET"
)
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).parents[3] / ".pytest_cache" / "triton" / "gpu")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():  # which ttsem answers too
        return
    reason = (
        "no GPU; without one: pip install --no-deps --ignore-requires-python ttsem==0.1.0 && "
        "python -m ttsem.sanitize pytest tests/triton/gpu"
    )
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
