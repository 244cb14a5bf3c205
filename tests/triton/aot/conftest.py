"""Compiles for GPUs that need not be here; the interpreter must be off."""

import os
import sys
from pathlib import Path

import pytest

assert os.environ.get("TRITON_INTERPRET", "0") != "1", (
    "tests/triton/aot needs its own process without TRITON_INTERPRET: pytest tests/triton/aot"
)
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).parents[3] / ".pytest_cache" / "triton" / "aot")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def poison_empty():
    """Nothing runs here, so there is nothing to poison."""
