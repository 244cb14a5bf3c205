"""What the compat modules share: the positive's cross entropy, dtypes, and falling back."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._patch import PATCHABLE, original

ODD = "these inputs are not ones that a kernel takes"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FallbackWarning(UserWarning):
    """A loss of fastcl.compat runs the library's own code, and why. Issued once per reason."""


def matrices(*tensors: Any) -> bool:
    """All are (rows, D) of one D and one device, dense and floating, with at least one row."""
    return all(
        isinstance(x, Tensor)
        and x.ndim == 2
        and x.layout == torch.strided
        and x.dtype in FLOATING
        and 0 not in x.shape
        and x.shape[1] == tensors[0].shape[1]
        and x.device == tensors[0].device
        for x in tensors
    )


def pairs(*tensors: Any) -> bool:
    """`matrices` of one shape."""
    return matrices(*tensors) and all(x.shape == tensors[0].shape for x in tensors)


def is_scalar(value: Any) -> bool:
    """A number, or a tensor with one number in it."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, (int, float))


def is_positive(value: Any) -> bool:
    """A scalar above 0; one on another device is not read, as that would wait for it."""
    if isinstance(value, Tensor):
        at_hand = value.device.type == "cpu" and not torch.compiler.is_compiling()
        return is_scalar(value) and (not at_hand or bool(value.detach() > 0))
    return is_scalar(value) and value > 0


def as_scalar(value: float | Tensor) -> float | Tensor:
    """A float, or a 0-dim tensor that keeps its gradient."""
    return value.reshape(()) if isinstance(value, Tensor) else float(value)


def as_their_dtype(loss: Tensor, *inputs: Tensor, on_cpu: str = "float32") -> Tensor:
    """A loss that was computed in float32, in the dtype of the plain expression's result.

    That is what the inputs promote to. Under autocast it is float32, as cross entropies and
    log-sum-exps are there; but on the CPU a log-sum-exp is not among the operations in float32, so
    that expressions without a cross entropy end in autocast's dtype (on_cpu="autocast") or in
    their inputs' (on_cpu="inputs").
    """
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
    device = loss.device.type
    if torch.is_autocast_enabled(device):
        if device != "cpu" or on_cpu == "float32":
            dtype = torch.promote_types(dtype, torch.float32)
        elif on_cpu == "autocast" and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
    return loss.to(dtype)


def in_float(x: Tensor) -> Tensor:
    """x in the dtype that sums are kept in: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """torch.nn.functional.normalize(x, dim=1), in at least float32."""
    return nn.functional.normalize(in_float(x), dim=1)


def paired_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> (N,)."""
    return (in_float(x) * in_float(y)).sum(1)


def against(others: Tensor, positive: Tensor) -> Tensor:
    """−log softmax of the positive's logit among all: log(1 + exp(others − positive)).

    others: the log-sum-exp of the other candidates' logits. Exact for small losses too.
    """
    return nn.functional.softplus(others - positive, threshold=40)


def row_lse(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """F.similarity_lse by rows (N,)."""
    lse = F.similarity_lse(query, key, **options)
    assert isinstance(lse, Tensor)
    return lse


def world_size() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def check_distributed(name: str, wanted: bool) -> None:
    """lightly's error, in its words."""
    if wanted and not torch.distributed.is_available():
        raise ValueError(f"{name} is True but torch.distributed is not available.")


def everyone() -> torch.distributed.ProcessGroup:
    """The default process group, which must have been set up."""
    group = torch.distributed.group.WORLD
    assert group is not None
    return group


# ---- the library's own code ----------------------------------------------------------------------


@functools.cache
def say_once(what: str, why: str) -> None:
    warnings.warn(f"{what} runs the library's own code: {why}.", FallbackWarning, stacklevel=4)


def fall_back(instance: Any, place: str, why: str, method: str = "forward") -> Any:
    """The library's own method, bound to our object, which has the same attributes.

    place: "module:class". Raises ImportError when the library is not installed.
    """
    theirs = their(place, why)
    return types.MethodType(getattr(theirs, method), instance)


def their(place: str, why: str) -> Any:
    """The library's own object, having said that and why it runs."""
    package, name = place.partition(".")[0].partition(":")[0], place.partition(":")[2]
    try:
        theirs = original(place)
    except ImportError as error:
        raise ImportError(
            f"fastcl.compat.{package}.{name}: {why}, which is left to {package}'s own code, and "
            f"{package} is not installed (pip install {PATCHABLE[package].distribution}).",
            name=package,
        ) from error
    say_once(f"fastcl.compat.{package}.{name}", why)
    return theirs
