"""The examples in docstrings run, and give what they say; every public loss has one."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
import torch

import fastcl.functional as F
from fastcl import losses, nn

PUBLIC = {
    **{f"functional.{name}": getattr(F, name) for name in F.__all__},
    **{f"losses.{name}": getattr(losses, name) for name in losses.__all__},
    **{
        f"nn.{name}": value
        for name, value in vars(nn).items()
        if getattr(value, "__module__", "") == nn.__name__ and ">>>" in (value.__doc__ or "")
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str) -> None:
    module: ModuleType = {"functional": F, "losses": losses, "nn": nn}[name.partition(".")[0]]
    torch.manual_seed(0)
    examples = doctest.DocTestParser().get_doctest(
        PUBLIC[name].__doc__, {**vars(module), "torch": torch, "F": F}, name, None, None
    )
    assert examples.examples, f"{name} has no example"
    said: list[str] = []
    failed = doctest.DocTestRunner().run(examples, out=said.append).failed
    assert not failed, "".join(said)


def test_the_modules_with_state_have_examples() -> None:
    assert {"nn.FeatureQueue", "nn.MemoryBank", "nn.Prototypes", "nn.momentum_copy"} <= set(PUBLIC)
