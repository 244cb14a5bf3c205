"""Registration with torch.library: one small vocabulary for every operation.

Each operation is opaque to torch.compile, has a fake kernel for shapes, and differentiates
through a backward operation of its own. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

LIBRARY = torch.library.Library("fastcl", "DEF")


class Operation:
    """A registered operation, which an eager call on plain tensors reaches past the dispatcher.

    The way through the dispatcher and back to Python costs some 20 µs forward and as much backward,
    which is half of a loss of 64 rows. Compilers, modes, function transforms and subclasses need
    that way and get it, and so do operations that write to their arguments: autograd must hear.
    """

    def __init__(self, overload: torch._ops.OpOverload, run: Callable[..., Any]) -> None:
        self.overload = overload  # torch.ops.fastcl.<name>.default
        self.run = run
        self.in_place = overload._schema.is_mutable
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.in_place or not nothing_listens(args):
            return self.overload(*args)
        if self.function is not None and torch.is_grad_enabled() and requires_grad(args):
            return self.function.apply(*args)
        return self.run(*args)


def nothing_listens(args: tuple[Any, ...]) -> bool:
    """Eager mode, outside dispatch modes and function transforms, and no subclass of Tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state():
        return False
    return all(type(x) in (Tensor, Parameter) for x in args if isinstance(x, Tensor))


def requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    """Register `run` under the schema on every device; returns the callable operation."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", fake, lib=LIBRARY)
    return Operation(getattr(torch.ops.fastcl, name).default, run)


def differentiate(
    operation: Operation, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Make the operation differentiable, once: a second derivative raises, never a silent zero."""
    name = operation.overload.name()

    def once(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():  # create_graph=True: it raises if the graph is used
            results = backward(ctx, *grads)
        return tuple(NoSecondDerivative.mark(x, name) for x in results)

    def forward(ctx: Any, *args: Any) -> Any:
        output = operation.run(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once)}
    operation.function = type(name, (torch.autograd.Function,), methods)
    torch.library.register_autograd(name, once, setup_context=setup_context, lib=LIBRARY)


class NoSecondDerivative(torch.autograd.Function):
    """The identity, whose derivative raises: stands behind the gradients of an operation."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.operation = name
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.operation}: second derivatives of the fused operations are not "
            "implemented; differentiate the formula in fastcl.reference instead."
        )

    @staticmethod
    def mark(gradient: Tensor | None, name: str) -> Tensor | None:
        """The gradient, as a result that has a derivative."""
        if gradient is None:
            return None
        marked: Tensor = NoSecondDerivative.apply(gradient.detach().requires_grad_(), name)
        return marked


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of losses and log-sum-exps: float32, or float64 for float64 input."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as kernels take them: dense and row-major."""
    return tuple(None if t is None else t.contiguous() for t in tensors)
