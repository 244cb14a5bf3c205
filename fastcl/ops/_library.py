"""Registration with torch.library: one small vocabulary for every operation.

Each operation is opaque to torch.compile, has a fake kernel for shapes, and differentiates
through a backward operation of its own. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastcl", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `run` under the schema on every device; returns the callable operation."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastcl, name).default


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Make the operation differentiable; its backward operation raises if differentiated again."""
    torch.library.register_autograd(
        f"fastcl::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def refuse_second_derivative(name: str) -> None:
    """Give a backward operation a derivative that raises instead of a silent zero."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"fastcl::{name}: second derivatives of the fused operations are not implemented; "
            "differentiate the formula in fastcl.reference instead."
        )

    torch.library.register_autograd(f"fastcl::{name}", backward, lib=LIBRARY)


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of losses and log-sum-exps: float32, or float64 for float64 input."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as kernels take them: dense and row-major."""
    return tuple(None if t is None else t.contiguous() for t in tensors)
