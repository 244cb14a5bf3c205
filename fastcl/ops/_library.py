"""Registration with torch.library: one small vocabulary for every operation.

Each operation is opaque to torch.compile, has a fake kernel for shapes, and differentiates
through a backward operation of its own. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

LIBRARY = torch.library.Library("fastcl", "DEF")


class Operation:
    """A registered operation, which an eager call on plain tensors reaches past the dispatcher.

    The way through the dispatcher and back to Python costs some 20 µs forward and as much backward,
    which is half of a loss of 64 rows. Compilers, modes, function transforms and subclasses need
    that way and get it, and profilers, whose traces then have the operation's name. An operation
    that writes to its arguments tells autograd itself.
    """

    def __init__(self, overload: torch._ops.OpOverload, run: Callable[..., Any]) -> None:
        self.overload = overload  # torch.ops.fastcl.<name>.default
        self.run = run
        self.function: type[torch.autograd.Function] | None = None
        self.transformable: type[torch.autograd.Function] | None = None  # slower by 15 µs

    def __call__(self, *args: Any) -> Any:
        if plain(*args) and not torch._C._autograd._profiler_enabled():
            if self.function is not None and differentiable(args):
                return self.function.apply(*args)
            return self.run(*args)
        compiling = torch.compiler.is_compiling()
        if self.transformable is not None and not compiling and transformed():
            return self.transformable.apply(*args)
        return self.overload(*args)

    def inside(self, *args: Any) -> Any:
        """What a function transform runs, which has seen to the derivative."""
        return self.run(*args) if plain(*args) else self.overload(*args)


def transformed() -> bool:
    """Inside a torch.func transform."""
    return torch._C._are_functorch_transforms_active()


def differentiable(args: tuple[Any, ...]) -> bool:
    """Reverse-mode or forward-mode differentiation may want to know."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str))


def plain(*args: Any) -> bool:
    """Eager mode, no dispatch mode, transform or trace, no subclass of Tensor."""
    if torch.compiler.is_compiling() or transformed():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state():
        return False
    for x in args:  # noqa: SIM110 (a generator takes twice the time, and every call comes here)
        if type(x) not in PLAIN and (type(x) is not list or not plain(*x)):
            return False
    return True


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
        if grads[0] is None:  # set_materialize_grads(False), by those whose only result that is
            return (None,) * len(ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():  # create_graph=True: it raises if the graph is used
            results = backward(ctx, *grads)
        inputs = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
        return tuple(None if x is None else Once.apply(name, x, *inputs) for x in results)

    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError(
            f"{name}: forward-mode differentiation of the fused operations is not implemented; "
            "differentiate the formula in fastcl.reference instead."
        )

    def forward(ctx: Any, *args: Any) -> Any:
        output = operation.run(*args)
        setup_context(ctx, args, output)
        return output

    operation.function = function(name, forward=forward, backward=once, jvp=jvp)
    operation.transformable = function(
        name,
        forward=operation.inside,
        setup_context=setup_context,
        backward=once,
        jvp=jvp,
    )
    operation.transformable.generate_vmap_rule = True
    torch.library.register_autograd(name, once, setup_context=setup_context, lib=LIBRARY)


def function(name: str, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
    """An autograd function of these static methods."""
    bases = (torch.autograd.Function,)
    return type(name, bases, {key: staticmethod(method) for key, method in methods.items()})


class Once(torch.autograd.Function):
    """A gradient as a function of what it was made from, whose own derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operation = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.operation}: second derivatives of the fused operations are not implemented; "
            "differentiate the formula in fastcl.reference instead."
        )


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of losses and log-sum-exps: float32, or float64 for float64 input."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as kernels take them: dense and row-major."""
    return [None if t is None else t.contiguous() for t in tensors]
