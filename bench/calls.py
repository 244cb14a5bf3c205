"""How to measure, and one call of a provider: what is checked, timed and watched is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Inputs, New
from bench.workloads import Function, Sizes, Workload, function_of, gradients_of

Step = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    repeats: int = 9
    seconds: float = 6.0  # of samples per provider and workload, but at least FEWEST_REPEATS
    longest: float = 300.0  # seconds; what is expected to take longer is not called
    memory: bool = True


def quiet() -> None:
    """No remarks of torch.compile between the tables."""
    logging.getLogger("torch").setLevel(logging.ERROR)


def one_line(error: Exception) -> str:
    message = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}"


def make_inputs(workload: Workload, sizes: Sizes, settings: Settings) -> Inputs:
    return workload.inputs(New(settings.dtype, settings.device), **sizes)


def copied(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a tensor or a list of them; floating-point ones in another dtype."""
    if isinstance(x, list):
        return [copied(t, dtype) for t in x]
    return x.detach().clone().to(dtype if dtype and x.is_floating_point() else x.dtype)


def step_of(workload: Workload, provider: str, sizes: Sizes, inputs: Inputs) -> Step:
    """One call of a provider on its own copy of the inputs."""
    function = function_of(workload, provider, sizes)
    return call_of(workload, function, inputs, gradients_of(workload, provider))


def call_of(
    workload: Workload,
    function: Function,
    inputs: Inputs,
    gradients: tuple[str, ...],
    dtype: torch.dtype | None = None,
) -> Step:
    """One call on its own copy of the inputs: the value and the gradients, or what it changed."""
    own = {name: copied(x, dtype) for name, x in inputs.items()}
    cotangent = own.pop("cotangent", None)
    leaves = [own[name].requires_grad_() for name in gradients]
    changed = [own[name] for name in workload.mutates]

    def step() -> dict[str, Tensor]:
        value = function(*own.values())
        if leaves:
            weights = None if cotangent is None else cotangent.to(value.dtype)
            found = torch.autograd.grad(value, leaves, weights)
            return {"value": value.detach(), **dict(zip(gradients, found))}
        if changed:
            return {name: flat(x) for name, x in zip(workload.mutates, changed)}
        return {"value": value}

    return step


def flat(x: Any) -> Any:
    return x if isinstance(x, Tensor) else FlatList(x)


class FlatList(list):  # type: ignore[type-arg]
    """A list of tensors that is compared as one vector, and costs nothing until then."""

    def double(self) -> Tensor:
        return torch.cat([t.double().flatten() for t in self])
