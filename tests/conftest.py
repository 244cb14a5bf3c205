"""Shared by all tests: golden files, the backends of this machine, and poisoned allocations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcl import _C

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """golden("name") is the file's arrays as tensors; see each file's `meta` for its source."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(np.array(arrays[key]))
                for key in arrays.files
                if arrays[key].dtype.kind in "fiub"
            }

    return load


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once on each backend of the CPU."""
    if request.param == "cpp" and _C.kernels is None:
        pytest.skip(_C.MISSING)
    monkeypatch.setenv("FASTCL_BACKEND", request.param)
    return request.param
