"""Networks without batch statistics: weight standardisation, group norm, careful initialisation.

    weight standardisation     ŵ = (w − mean w) / √(var w + 10⁻¹⁰), over each output's weights
        kind "qiao":           ŵ = (w − mean w) / (std w + 10⁻⁵), unbiased std
    group norm                 over the pixels and the channels of each of `groups` groups
    careful initialisation     y = scale · x + offset in place of a norm; one batch sets
                               scale = 1/√(var x + 10⁻⁵), offset = −scale · mean x, then both learn

Sources: Qiao et al. 2019, arXiv:1903.10520; Kolesnikov et al. 2019, arXiv:1912.11370 ("bit", the
default); Wu & He 2018, arXiv:1803.08494; Richemond et al. 2020, arXiv:2010.10241.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

M = TypeVar("M", bound=nn.Module)

NORMS = ("bn", "gn", "gn+ws", "ln", "none")
KINDS = ("bit", "qiao")


def standardise(weight: Tensor, kind: str = "bit") -> Tensor:
    """weight (outputs, …), each output's to mean 0 and variance 1."""
    w = weight.flatten(1)
    centred = w - w.mean(1, keepdim=True)
    if kind == "bit":
        scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-10)
    else:
        scale = 1 / (w.std(1, keepdim=True) + 1e-5)
    standard: Tensor = centred * scale
    return standard.reshape(weight.shape)


class StandardisedConv2d(nn.Conv2d):
    """nn.Conv2d with standardised weights; the parameters are those before it."""

    kind: str = "bit"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, standardise(self.weight, self.kind), self.bias)
        return y


class StandardisedLinear(nn.Linear):
    """nn.Linear with standardised weights."""

    kind: str = "bit"

    def forward(self, x: Tensor) -> Tensor:
        return nf.linear(x, standardise(self.weight, self.kind), self.bias)


class Affine(nn.Module):
    """scale · x + offset, channel by channel: x (N, C, …). Where a norm was, without statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def initialize_(self, x: Tensor) -> None:
        """Give the outputs for x mean 0 and variance 1."""
        rest = [d for d in range(x.ndim) if d != 1]
        scale = torch.rsqrt(x.var(rest, correction=0) + 1e-5)
        self.weight.copy_(scale)
        self.bias.copy_(-x.mean(rest) * scale)


@torch.no_grad()
def careful_init_(module: nn.Module, *inputs: Tensor) -> None:
    """Initialise every Affine of module, in the order of a forward pass, by one batch.

    By the first rows that reach it, where module takes its inputs a few rows at a time.
    """
    done: set[nn.Module] = set()

    def initialize_once(affine: Affine, given: tuple[Tensor, ...]) -> None:
        if affine not in done:
            done.add(affine)
            affine.initialize_(given[0])

    hooks = [
        part.register_forward_pre_hook(initialize_once)
        for part in module.modules()
        if isinstance(part, Affine)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # the hooks are for this pass alone
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def make_norm(norm: str, channels: int, *, groups: int = 16, careful: bool = False) -> nn.Module:
    """A norm of (N, channels) or, except "bn", (N, channels, …). Raises ValueError."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}. Norms: {', '.join(NORMS)}")
    if norm == "bn":
        return nn.BatchNorm1d(channels)
    if norm == "none":
        return Affine(channels) if careful else nn.Identity()
    if norm != "ln" and channels % groups:
        raise ValueError(
            f"{channels} channels cannot be split into {groups} groups of a group norm"
        )
    return nn.GroupNorm(1 if norm == "ln" else groups, channels)


def replace_batch_norm(
    module: M, norm: str, *, groups: int = 16, kind: str = "bit", careful: bool = False
) -> M:
    """Put `norm` where module has batch norm for images; "gn+ws" standardises convolutions too.

    Returns module, changed in place. The new norms start at the γ and β of the old.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}. Norms: {', '.join(NORMS)}")
    _known(kind)
    if norm == "bn":
        return module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = make_norm(norm, child.num_features, groups=groups, careful=careful)
            if isinstance(new, nn.GroupNorm | Affine):
                new.load_state_dict({"weight": child.weight, "bias": child.bias})
            setattr(module, name, new)
        else:
            replace_batch_norm(child, norm, groups=groups, kind=kind, careful=careful)
    if norm == "gn+ws" and type(module) is nn.Conv2d:
        module.__class__ = StandardisedConv2d  # type: ignore[assignment]
        module.__dict__["kind"] = kind
    return module


def mlp(
    features: int,
    hidden: int,
    dim: int,
    norm: str,
    *,
    groups: int = 16,
    kind: str = "bit",
    careful: bool = False,
) -> nn.Module:
    """BYOL's projector and predictor with any norm: (N, features) -> (N, dim).

    The last layer is not standardised: no norm after it would set the scale right.
    """
    _known(kind)
    first = StandardisedLinear(features, hidden) if norm == "gn+ws" else nn.Linear(features, hidden)
    if isinstance(first, StandardisedLinear):
        first.kind = kind
    between = make_norm(norm, hidden, groups=groups, careful=careful)
    return nn.Sequential(first, between, nn.ReLU(), nn.Linear(hidden, dim, bias=False))


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown weight standardisation {kind!r}. Kinds: {', '.join(KINDS)}")
