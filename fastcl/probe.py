"""A linear classifier on features that do not change, by each paper's protocol.

    logits = W x + b,  mean cross entropy, SGD with momentum

                 lr      batch   epochs   schedule                     and
    moco         30      256     100      × 0.1 at 60, 80              v1, v2
    simclr       1.6     4096    90       cosine                       Nesterov, W = 0 at first
    swav         0.3     256     100      cosine                       weight decay 10⁻⁶
    byol         0.8     1024    80       cosine                       Nesterov
    simsiam      1.6     4096    90       cosine                       LARC, the bias adapted too
    moco-v3      0.4     1024    90       cosine                       ResNets
    moco-v3-vit  12      1024    90       cosine
    dino         0.004   1024    100      cosine                       class tokens of 4 blocks
    dino-base    0.004   1024    100      cosine                       of the last, and the patches
    cpc          0.1     2048    136      × 0.1 at 80, 120             mean of the patches
    cmc          30      256     60       × 0.2 at 30, 40, 50          both encoders' features
    cmc-wide     50                       the same                     encoders of double width
    cmc-alexnet  0.1                      the same

CPC counts 50,000, 25,000 and 10,000 updates, which are those epochs of ImageNet. The learning rates
are for ImageNet's 1.28 million images: on thousands the small ones (dino) do not get far.

Sources: the papers and official code of each method; SimCLR: arXiv:2002.05709, appendix B.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

from fastcl.models.tiny import TinyViT
from fastcl.optim import LARS


@dataclass(frozen=True)
class Protocol:
    """How a linear classifier is trained, and on which features of a vision transformer."""

    lr: float
    epochs: int
    batch_size: int = 256
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    larc: bool = False  # SGD's step adapted to the norm of each tensor
    milestones: tuple[int, ...] | None = None  # epochs where lr falls by factor; None: cosine to 0
    factor: float = 0.1
    zero_init: bool = False  # else W ~ N(0, 0.01²)
    blocks: int = 1  # whose class tokens are side by side
    patches: bool = False  # and the mean of the last block's patches


CMC = Protocol(lr=30.0, epochs=60, milestones=(30, 40, 50), factor=0.2)
PROTOCOLS = {
    "moco": Protocol(lr=30.0, epochs=100, milestones=(60, 80)),
    "simclr": Protocol(lr=1.6, epochs=90, batch_size=4096, nesterov=True, zero_init=True),
    "swav": Protocol(lr=0.3, epochs=100, weight_decay=1e-6),
    "byol": Protocol(lr=0.8, epochs=80, batch_size=1024, nesterov=True),
    "simsiam": Protocol(lr=1.6, epochs=90, batch_size=4096, larc=True),
    "moco-v3": Protocol(lr=0.4, epochs=90, batch_size=1024),
    "moco-v3-vit": Protocol(lr=12.0, epochs=90, batch_size=1024),
    "dino": Protocol(lr=0.004, epochs=100, batch_size=1024, blocks=4),
    "dino-base": Protocol(lr=0.004, epochs=100, batch_size=1024, patches=True),
    "cpc": Protocol(lr=0.1, epochs=136, batch_size=2048, milestones=(80, 120)),
    "cmc": CMC,
    "cmc-wide": Protocol(lr=50.0, epochs=60, milestones=(30, 40, 50), factor=0.2),
    "cmc-alexnet": Protocol(lr=0.1, epochs=60, milestones=(30, 40, 50), factor=0.2),
}


def own_protocol(method: str, backbone: str = "", width: float = 1.0) -> str:
    """The name of the protocol of a method's paper; MoCo's where it has none (InvaSpread, …)."""
    if method == "moco-v3" and "vit" in backbone:
        return "moco-v3-vit"
    if method == "dino" and "base" in backbone:
        return "dino-base"
    if method == "cmc" and backbone == "alexnet-bn":
        return "cmc-alexnet"
    if method == "cmc" and width > 1:
        return "cmc-wide"
    family = method.partition("-")[0]
    return next((name for name in (method, family) if name in PROTOCOLS), "moco")


def linear_probe(
    train_features: Tensor | Callable[[int], Tensor],
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    protocol: Protocol = PROTOCOLS["moco"],
    *,
    seed: int = 0,
) -> float:
    """The share of test rows, 0 to 1, that softmax regression on the training rows gets right.

    train_features (N, D), train_labels (N,), test_features (M, D), test_labels (M,), as
    `fastcl.evaluate.features_and_labels` gives them. train_features may be a function of the epoch:
    the papers crop and flip the training images anew in each, where features that were computed
    once are those of the test view.
    """
    generator = torch.Generator().manual_seed(seed)
    count, dim = len(train_labels), test_features.shape[1]
    classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    p = protocol
    weight = 0.01 * torch.randn(classes, dim, generator=generator)
    weight = (0 * weight if p.zero_init else weight).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    named = [("weight", weight), ("bias", bias)]
    optimizer: torch.optim.Optimizer = (
        LARS.larc(named, p.lr, momentum=p.momentum, weight_decay=p.weight_decay)
        if p.larc
        else torch.optim.SGD(
            [weight, bias], p.lr, p.momentum, weight_decay=p.weight_decay, nesterov=p.nesterov
        )
    )
    for epoch in range(p.epochs):
        for group in optimizer.param_groups:
            group["lr"] = p.lr * _factor(p, epoch)
        x = train_features(epoch) if callable(train_features) else train_features
        for rows in torch.split(torch.randperm(count, generator=generator), p.batch_size):
            logits = nf.linear(x[rows], weight, bias)
            optimizer.zero_grad()
            torch.autograd.backward(nf.cross_entropy(logits, train_labels[rows]))
            optimizer.step()
    with torch.no_grad():
        predicted = nf.linear(test_features, weight, bias).argmax(1)
    return float((predicted == test_labels).float().mean())


def _factor(p: Protocol, epoch: int) -> float:
    if p.milestones is None:
        return 0.5 * (1 + math.cos(math.pi * epoch / p.epochs))
    return p.factor ** sum(epoch >= milestone for milestone in p.milestones)


def probed(encoder: nn.Module, protocol: Protocol) -> nn.Module:
    """What a protocol takes the features of: the encoder, or several blocks of a transformer."""
    if not (protocol.blocks > 1 or protocol.patches) or not _is_transformer(encoder):
        return encoder
    return LastBlocks(encoder, protocol.blocks, protocol.patches)


def _is_transformer(encoder: nn.Module) -> bool:
    return isinstance(encoder, TinyViT) or all(
        hasattr(encoder, part) for part in ("blocks", "norm", "cls_token")
    )


class LastBlocks(nn.Module):
    """Class tokens of a transformer's last blocks, each after the last norm: (N, blocks · D).

    patches adds the mean of the last block's other tokens. tiny-vit has no class token: the mean of
    all takes its place.
    Source: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino, eval_linear.py.
    """

    def __init__(self, encoder: nn.Module, blocks: int, patches: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks, self.patches = blocks, patches

    def forward(self, images: Tensor) -> Tensor:
        norm = self.encoder.get_submodule("norm")
        layers = list(self.encoder.get_submodule("blocks").children())[-self.blocks :]
        seen: list[Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
            seen.append(norm(tokens))  # (N, T, D)

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            self.encoder(images)
        finally:
            for hook in hooks:
                hook.remove()
        own = getattr(self.encoder, "cls_token", None) is not None
        features = [tokens[:, 0] if own else tokens.mean(1) for tokens in seen]
        if self.patches:
            features.append(seen[-1][:, 1 if own else 0 :].mean(1))
        return torch.cat(features, 1)
