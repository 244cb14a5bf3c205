"""The stateful parts that the methods are made of: queues, prototypes, heads, momentum copies.

Losses are in fastcl.functional and keep no state; what a method remembers between steps is here.
With a `group` (fastcl.parallel gives it) what is remembered is the same on every rank: they push,
write and average the whole batch.
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, linear, normalize

import fastcl.functional as F
from fastcl.distributed import Group, average, members_of, whole

M = TypeVar("M", bound=nn.Module)

ROWS = 1 << 16  # of a queue or bank that are drawn at a time, so that a huge one has no copy


class FeatureQueue(nn.Module):
    """The most recent `size` embeddings, as a ring buffer of rows.

    Starts as random unit vectors, so that a loss over it is defined from the first step. The
    published queues need `size` to be a multiple of the batch; this one wraps around anywhere.

    dtype: float32, or bfloat16 or float16 for half the memory; keys are rounded to it.

    Buffers: features (size, dim), pointer int64 (1,), the row that is written next.
    Source: He et al. 2020, arXiv:1911.05722 (which stores it as (dim, size)).

        >>> queue = FeatureQueue(size=6, dim=4)
        >>> keys = torch.nn.functional.normalize(torch.randn(4, 4))
        >>> queue.push(keys)
        >>> torch.equal(queue.features[:4], keys), queue.pointer
        (True, tensor([4]))
    """

    features: Tensor
    pointer: Tensor
    group: Group | None = None

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"FeatureQueue: size and dim must be at least 1; got {size}, {dim}.")
        self.register_buffer("features", torch.empty(size, dim, dtype=dtype))
        for rows in self.features.split(ROWS):
            rows.copy_(normalize(torch.randn(rows.shape), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with keys (N, dim)."""
        F.queue_push_(self.features, self.pointer, whole(keys, self.group))

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"{size}, {dim}"


class MemoryBank(nn.Module):
    """One embedding for each image of the data, a moving average on the unit sphere.

    Starts uniform in a cube whose vectors have length 1 in the mean square.
    dtype: float32, or bfloat16 or float16 for half the memory; the average is computed in float32.

    Buffer: features (size, dim).
    Source: Wu et al. 2018, arXiv:1805.01978; zhirongw/lemniscate.pytorch.

        >>> bank = MemoryBank(size=100, dim=4)
        >>> bank.update(torch.tensor([7]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        >>> torch.allclose(bank.features[7].norm(), torch.tensor(1.0))
        True
    """

    features: Tensor
    group: Group | None = None

    def __init__(
        self, size: int, dim: int, momentum: float = 0.5, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"MemoryBank: size and dim must be at least 1; got {size}, {dim}.")
        self.momentum = momentum
        bound = (3 / dim) ** 0.5
        self.register_buffer("features", torch.empty(size, dim, dtype=dtype))
        for rows in self.features.split(ROWS):
            rows.copy_(torch.empty(rows.shape).uniform_(-bound, bound))

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> None:
        """Move rows index (N,) towards unit features (N, dim); of equal rows the last counts."""
        index, features = whole(index, self.group), whole(features, self.group)
        F.bank_update_(self.features, index, features, momentum=self.momentum)

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"{size}, {dim}, momentum={self.momentum}"


class Partition(nn.Module):
    """Z of noise-contrastive estimation: n · mean of exp over the first batch's scores, then fixed.

    momentum > 0: a moving average of it instead, for small batches, whose first is a poor guess.

    Buffer: z, 0-dim; 0 before the first batch.
    Source: Wu et al. 2018, arXiv:1805.01978; the average: HobbitLong/CMC, issue 23.
    """

    z: Tensor
    group: Group | None = None

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("z", torch.zeros(()))

    @torch.no_grad()
    def forward(self, scores: Tensor, images: int) -> Tensor:
        """Z, 0-dim, for scores (N, 1 + K) against a bank of n = images rows."""
        now = images * average(scores.exp().mean(), len(scores), self.group)
        m = self.momentum
        later = m * self.z + (1 - m) * now if m > 0 else self.z
        self.z.copy_(torch.where(self.z == 0, now, later))
        return self.z.clone()


class Prototypes(nn.Module):
    """K cluster centres: scores = z Cᵀ, the rows of C of unit length after `normalize_()`.

    Parameter: weight (count, dim).
    Source: Caron et al. 2020 (SwAV), arXiv:2006.09882.

        >>> prototypes = Prototypes(dim=4, count=10)
        >>> prototypes.normalize_()
        >>> prototypes(torch.randn(8, 4)).shape  # scores
        torch.Size([8, 10])
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())

    def forward(self, z: Tensor) -> Tensor:
        """z (N, dim) -> scores (N, count)."""
        return linear(z, self.weight)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Put the rows back on the unit sphere, where an optimizer's step has left it."""
        self.weight.copy_(normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        count, dim = self.weight.shape
        return f"{dim}, {count}"


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are of `splits` interleaved groups of the batch.

    One device's stand-in for what MoCo needs of many: with statistics over the whole batch, the
    query and its key leak to each other which sample they are. Group g holds the samples n with
    n mod splits = g. In evaluation it is plain batch norm; its state has the same names.

    On W ranks, which share a batch out in this way (`share_out`), each has splits / W of the groups
    and the running statistics are means over all of them.

    Source: the CIFAR demo of facebookresearch/moco (branch colab-notebook).
    """

    def __init__(self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = splits
        self.group: Group | None = None

    def share_out(self, group: Group) -> None:
        """Of its groups, keep this rank's. Raises ValueError where W does not divide them."""
        world = torch.distributed.get_world_size(members_of(group))
        if self.splits % world:
            raise ValueError(
                f"{self.splits} batch-norm groups cannot be shared out to {world} processes: "
                f"take --bn-splits {world}, or a multiple of it, or 1"
            )
        self.splits, self.group = self.splits // world, group

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W), N a multiple of splits."""
        s = self.splits
        if not self.training:
            return super().forward(x)
        if x.shape[0] % s:
            raise ValueError(
                f"SplitBatchNorm: the batch must be a multiple of splits ({s}); got {x.shape[0]}."
            )
        assert self.running_mean is not None and self.running_var is not None
        mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
        y = batch_norm(
            x.reshape(x.shape[0] // s, s * x.shape[1], *x.shape[2:]),  # a row is one of each group
            mean,
            var,
            self.weight.repeat(s),
            self.bias.repeat(s),
            training=True,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )
        with torch.no_grad():
            running = torch.stack((mean.view(s, -1).mean(0), var.view(s, -1).mean(0)))
            mean, var = average(running, s, self.group)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, splits={self.splits}"


def split_batch_norm(module: M, splits: int) -> M:
    """Replace every BatchNorm2d in module by a SplitBatchNorm with the same weights.

    Returns module, changed in place; splits = 1 changes nothing.
    """
    if splits == 1:
        return module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = SplitBatchNorm(child.num_features, splits, child.eps, child.momentum or 0.0)
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            split_batch_norm(child, splits)
    return module


def momentum_copy(module: M) -> M:
    """A copy of module that only `fastcl.functional.ema_update_` changes: no gradients.

    Batch-norm buffers are copied once and then follow the copy's own forward passes.

        >>> teacher = momentum_copy(torch.nn.Linear(3, 2))
        >>> [p.requires_grad for p in teacher.parameters()]
        [False, False]
    """
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def moco_head(features: int, dim: int) -> nn.Module:
    """MoCo v1: (N, features) -> (N, dim), one linear layer.

    Source: He et al. 2020, arXiv:1911.05722.
    """
    return nn.Linear(features, dim)


def moco_v2_head(features: int, dim: int) -> nn.Module:
    """MoCo v2: (N, features) -> (N, dim), two layers with biases and without batch norm.

    Source: Chen et al. 2020, arXiv:2003.04297.
    """
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


def simclr_head(features: int, dim: int, layers: int = 2) -> nn.Module:
    """SimCLR: (N, features) -> (N, dim), each layer linear without bias, then batch norm.

    ReLU follows all but the last batch norm, which has no shift. Two layers in v1, three in v2.
    Source: Chen et al. 2020, arXiv:2002.05709. As its code; the paper's text names no batch norm.
    """
    parts: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        dense = nn.Linear(features, dim if last else features, bias=False)
        nn.init.normal_(dense.weight, std=0.01)
        norm = nn.BatchNorm1d(dense.out_features)
        if last:
            norm.bias.requires_grad_(False)  # stays at 0
        parts += [dense, norm] if last else [dense, norm, nn.ReLU()]
    return nn.Sequential(*parts)


def centred(head: nn.Module, dim: int) -> nn.Module:
    """head with batch norm (no scale, no shift) after it, as MoCo v3 and SimSiam have.

    An untrained encoder's embeddings all point one way, and a loss of a thousand steps is spent on
    spreading them; centred, they are spread from the start.
    """
    return nn.Sequential(head, nn.BatchNorm1d(dim, affine=False))


def swav_head(features: int, hidden: int, dim: int) -> nn.Module:
    """SwAV: (N, features) -> (N, dim), two layers with biases, batch norm on the hidden one.

    Source: Caron et al. 2020, arXiv:2006.09882.
    """
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim)
    )


def simsiam_projector(features: int, dim: int, layers: int = 3) -> nn.Module:
    """SimSiam: (N, features) -> (N, dim), each layer linear, then batch norm, at last without γ, β.

    The last linear layer has a bias that is never trained: the batch norm takes it out again.
    Source: Chen & He 2020, arXiv:2011.10566.
    """
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    last = nn.Linear(features, dim)
    last.bias.requires_grad_(False)
    return nn.Sequential(*parts, last, nn.BatchNorm1d(dim, affine=False))


def simsiam_predictor(dim: int, hidden: int) -> nn.Module:
    """SimSiam: (N, dim) -> (N, dim) through a bottleneck, batch norm on the hidden layer only.

    Source: Chen & He 2020, arXiv:2011.10566.
    """
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim),
    )


def byol_mlp(features: int, hidden: int, dim: int, norm: str = "bn") -> nn.Module:
    """BYOL's projector and predictor: (N, features) -> (N, dim), no bias in the last layer.

    norm is that of the hidden layer: "bn", "ln" or "none".
    Source: Grill et al. 2020, arXiv:2006.07733.
    """
    norms: dict[str, Callable[[int], nn.Module]] = {
        "bn": nn.BatchNorm1d,
        "ln": nn.LayerNorm,
        "none": lambda _: nn.Identity(),
    }
    if norm not in norms:
        raise ValueError(f"unknown norm {norm!r}. Norms: {', '.join(norms)}")
    return nn.Sequential(
        nn.Linear(features, hidden),
        norms[norm](hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim, bias=False),
    )


def moco_v3_mlp(layers: int, features: int, hidden: int, dim: int, last_norm: bool) -> nn.Module:
    """MoCo v3's projector and predictor: (N, features) -> (N, dim), no biases, batch norm in each.

    last_norm puts one without γ and β after the last layer too.
    Source: Chen et al. 2021, arXiv:2104.02057.
    """
    parts: list[nn.Module] = []
    for i in range(layers - 1):
        width = hidden if i else features
        parts += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    parts.append(nn.Linear(hidden if layers > 1 else features, dim, bias=False))
    return nn.Sequential(*parts, *([nn.BatchNorm1d(dim, affine=False)] if last_norm else []))


class UnitLinear(nn.Module):
    """x Wᵀ with rows w_k = g_k v_k / ‖v_k‖: weight norm, without bias.

    unit=True keeps every g_k at 1. The parameters have the names of torch.nn.utils.weight_norm:
    weight_g (count, 1), weight_v (count, dim).
    Source: Salimans & Kingma 2016, arXiv:1602.07868; DINO's last layer.
    """

    def __init__(self, dim: int, count: int, unit: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit)
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, dim) -> (N, count)."""
        return linear(x, self.weight_g * normalize(self.weight_v, dim=1))

    def extra_repr(self) -> str:
        count, dim = self.weight_v.shape
        return f"{dim}, {count}, unit={not self.weight_g.requires_grad}"


class DINOHead(nn.Module):
    """DINO: (N, features) -> (N, outputs): layers with GELU, a unit vector of size dim, cosines.

    After `forward`, `embedding` (N, dim) is what came before the unit vector, without gradient.
    Source: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino, with its names.
    """

    embedding: Tensor

    def __init__(
        self,
        features: int,
        hidden: int,
        dim: int,
        outputs: int,
        *,
        layers: int = 3,
        batch_norm: bool = False,
        unit: bool = True,
        centre: bool = False,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(layers - 1):
            parts.append(nn.Linear(hidden if i else features, hidden))
            parts += [*([nn.BatchNorm1d(hidden)] if batch_norm else []), nn.GELU()]
        parts.append(nn.Linear(hidden if layers > 1 else features, dim))
        for part in parts:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        if centre:  # see `centred`
            parts.append(nn.BatchNorm1d(dim, affine=False))
        self.mlp = nn.Sequential(*parts)
        self.last_layer = UnitLinear(dim, outputs, unit)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, features) -> (N, outputs)."""
        z = self.mlp(x)
        self.embedding = z.detach()
        y: Tensor = self.last_layer(normalize(z, dim=1))
        return y
