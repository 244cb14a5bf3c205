"""For the comparisons with other libraries: the same inputs through theirs and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcl.compat import _common
from fastcl.testing import GRADIENT_SLACK, LOSS_SLACK

# Rounding of a result to the dtype, once or a few times, as a fraction of its largest entry.
SLACK = {torch.float64: 1e-12, torch.float32: 0.0, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Comparison:
    """A class of the library beside ours, through as many steps as wanted.

    Values and gradients must be as near to the library's in float64 as the library's own in
    `dtype`, plus slack; shapes, dtypes, buffers and state-dict keys must be equal. Unless
    fused=False, the library's own code may not be what ran.
    """

    def __init__(self, theirs: Any, ours: Any, dtype: torch.dtype, *, fused: bool = True) -> None:
        self.theirs, self.ours, self.dtype, self.fused = theirs, ours, dtype, fused
        if isinstance(theirs, torch.nn.Module):
            copy_buffers(theirs, ours)
        self.truth = copy.deepcopy(theirs)
        if isinstance(theirs, torch.nn.Module):
            self.truth.double()

    def step(
        self, call: Callable[..., Any], inputs: Sequence[Tensor], *, needs: Sequence[bool] = ()
    ) -> Tensor:
        """call(module, *inputs) through both; inputs in float64. Returns our result."""
        needs = needs or [True] * len(inputs)
        results = [
            run(call, module, inputs, needs, dtype)
            for module, dtype in (
                (self.ours, self.dtype),
                (self.theirs, self.dtype),
                (self.truth, torch.float64),
            )
        ]
        ours, theirs, truth = results
        assert ours[0].dtype == theirs[0].dtype
        assert ours[0].requires_grad == theirs[0].requires_grad
        for i, (x, y, z) in enumerate(zip(ours, theirs, truth)):
            assert (x is None) == (y is None), f"gradient {i - 1}"
            if x is None:
                continue
            assert x.shape == y.shape, f"{i}: {x.shape}, not {y.shape}"
            slack = (GRADIENT_SLACK if i else LOSS_SLACK) if self.dtype != torch.float64 else 0.0
            # What counts as a size: the result's, or where that vanishes, what it is made of.
            made_of = 0.1 / inputs[i - 1].abs().max() if i else torch.tensor(0.1)
            error, allowed = (error_of(r, z, made_of) for r in (x, y))
            allowed += slack + SLACK[self.dtype]
            name = f"gradient {i - 1}" if i else "loss"
            assert error <= allowed, f"{name}: error {error:.2e} above {allowed:.2e}"
        self.same_state()
        if self.fused:
            assert _common.say_once.cache_info().currsize == 0, "the library's own code ran"
        return ours[0]

    def same_state(self) -> None:
        if not isinstance(self.theirs, torch.nn.Module):
            return
        assert list(self.ours.state_dict()) == list(self.theirs.state_dict())
        ours, theirs = dict(self.ours.named_buffers()), dict(self.theirs.named_buffers())
        assert list(ours) == list(theirs)
        for name, buffer in theirs.items():
            torch.testing.assert_close(ours[name], buffer, msg=lambda m, n=name: f"{n}: {m}")


def error_of(result: Tensor, truth: Tensor, floor: Tensor) -> float:
    """The largest deviation, relative to the largest entry or the floor; 0 for equal infinities."""
    result, truth = result.detach().double(), truth.detach().double()
    deviation = torch.where(result == truth, 0.0, (result - truth).abs())
    return float(deviation.max() / truth.abs().max().clamp_min(floor))


def run(
    call: Callable[..., Any],
    module: Any,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """[result, gradient of each input]; the cotangent is the same for everyone."""
    leaves = [
        x.to(dtype).detach().clone().requires_grad_(need) if x.is_floating_point() else x
        for x, need in zip(inputs, needs)
    ]
    result = call(module, *leaves)
    if result.requires_grad:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        result.backward(cotangent.to(result.dtype))
    return [result, *(x.grad for x in leaves)]


def copy_buffers(source: torch.nn.Module, target: torch.nn.Module) -> None:
    buffers = dict(target.named_buffers())
    for name, buffer in source.named_buffers():
        buffers[name].copy_(buffer)


@pytest.fixture
def compare() -> type[Comparison]:
    return Comparison


@pytest.fixture(autouse=True)
def fallbacks_are_said_once() -> Iterator[None]:
    """Each test starts as if nothing had been said."""
    _common.say_once.cache_clear()
    yield


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """draw(*shape) is normal, float64, and the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal


class Largest(TorchDispatchMode):
    """Within it, `numbers` is the size of the largest tensor that any operation has made."""

    numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > 0:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.itemsize)
        return result


@pytest.fixture
def largest() -> Callable[[Callable[[], Tensor]], int]:
    """largest(f): the size of the largest tensor made in f().backward()."""

    def measure(function: Callable[[], Tensor]) -> int:
        with Largest() as mode:
            function().backward()
        return mode.numbers

    return measure
