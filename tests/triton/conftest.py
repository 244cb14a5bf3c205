"""The Triton kernels' tests, in three folders that must each be a pytest process of their own.

interp/   the kernels run by Triton's interpreter: TRITON_INTERPRET=1 pytest tests/triton/interp
aot/      every shipped launch compiled for GPUs and counted: pytest tests/triton/aot
gpu/      on a GPU, or on the CPU by ttsem: python -m ttsem.sanitize pytest tests/triton/gpu

TRITON_INTERPRET acts when triton is imported, hence the processes.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the cases shared by interp/ and gpu/


def poisoned(allocate):
    """torch.empty and its kin, filled with NaN: an output that a kernel forgets must show."""

    def allocate_and_poison(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return (
            tensor.fill_(torch.iinfo(tensor.dtype).max - 90)
            if tensor.dtype != torch.bool
            else tensor
        )

    return allocate_and_poison


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
