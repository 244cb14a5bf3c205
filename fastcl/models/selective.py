"""SimCLR's ResNets: any width, v1's initialisation; with selective kernels also v2's ResNet-D.

    u = relu(bn(conv₃ₓ₃(x))), 2F channels, in two streams u₀, u₁
    g = mean over pixels of u₀ + u₁
    a = softmax over the two streams of W₂ relu(bn(W₁ g))       per channel
    selective kernels:  y = a₀ u₀ + a₁ u₁

ResNet-D: a stem of three 3×3 convolutions, and 2×2 means before the 1×1 of a shortcut.

Sources: Li et al. 2019, arXiv:1903.06586 (here with one size of kernel, as in SimCLR v2);
He et al. 2018, arXiv:1812.01187; google-research/simclr, resnet.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

LAYERS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
SMALL_IMAGE = 64  # pixels: at most this much, and the stem keeps the resolution


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, relu: bool = True) -> nn.Module:
    """Convolution, batch norm and, if asked for, ReLU; padding (size − 1) / 2."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=(size - 1) // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class SelectiveKernels(nn.Module):
    """x (N, inputs, H, W) -> (N, filters, ⌈H/stride⌉, ⌈W/stride⌉)."""

    def __init__(self, inputs: int, filters: int, stride: int = 1, ratio: float = 0.0625) -> None:
        super().__init__()
        middle = max(int(filters * ratio), 32)
        self.streams = conv_bn(inputs, 2 * filters, 3, stride)
        self.reduce = conv_bn(filters, middle, 1)
        self.expand = nn.Conv2d(middle, 2 * filters, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.stack(self.streams(x).chunk(2, 1))  # (2, N, F, H, W)
        g = u.sum(0).mean((2, 3), keepdim=True)  # (N, F, 1, 1)
        a = torch.stack(self.expand(self.reduce(g)).chunk(2, 1)).softmax(0)
        return (a * u).sum(0)


class MeanPool(nn.Module):
    """Means of 2×2 pixels. stride 1 repeats the last row and column, 2 adds zeros, as TF does."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = nf.pad(x, (0, 1, 0, 1), mode="replicate" if self.stride == 1 else "constant")
        return nf.avg_pool2d(x, 2, self.stride)


class Bottleneck(nn.Module):
    """relu(shortcut(x) + bn(conv₁ₓ₁(middle(relu(bn(conv₁ₓ₁ x)))))), 4F channels."""

    def __init__(self, inputs: int, filters: int, stride: int, sk_ratio: float) -> None:
        super().__init__()
        outputs = 4 * filters
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = (
                nn.Sequential(MeanPool(stride), conv_bn(inputs, outputs, 1, relu=False))
                if sk_ratio > 0
                else conv_bn(inputs, outputs, 1, stride, relu=False)
            )
        self.first = conv_bn(inputs, filters, 1)
        self.middle = (
            SelectiveKernels(filters, filters, stride, sk_ratio)
            if sk_ratio > 0
            else conv_bn(filters, filters, 3, stride)
        )
        self.last = conv_bn(filters, outputs, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return nf.relu(self.shortcut(x) + self.last(self.middle(self.first(x))))


class SelectiveResNet(nn.Module):
    """images (N, C, H, W) -> (N, 2048 · width): the mean over the last map."""

    def __init__(
        self,
        layers: tuple[int, ...],
        *,
        in_channels: int = 3,
        width: int = 1,
        sk_ratio: float = 0.0625,
        image_size: int = 224,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        w = 64 * width
        if image_size <= SMALL_IMAGE:
            self.stem: nn.Module = conv_bn(in_channels, w, 3)
        else:
            stem = (
                [
                    conv_bn(in_channels, w // 2, 3, 2),
                    conv_bn(w // 2, w // 2, 3),
                    conv_bn(w // 2, w, 3),
                ]
                if sk_ratio > 0
                else [conv_bn(in_channels, w, 7, 2)]
            )
            self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, padding=1))
        blocks, inputs = [], w
        for stage, count in enumerate(layers):
            filters = w * 2**stage
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Bottleneck(inputs, filters, stride, sk_ratio))
                inputs = 4 * filters
        self.blocks = nn.Sequential(*blocks)
        self.feature_dim = inputs
        truncated_init_(self)
        if zero_init_residual:
            for block in blocks:
                nn.init.zeros_(block.last.get_submodule("1").get_parameter("weight"))

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.stem(images))
        return y.mean((2, 3))


@torch.no_grad()
def truncated_init_(module: nn.Module) -> None:
    """Convolutions as in SimCLR's code: a normal cut at two deviations, variance 1 / fan-in."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            std = part.weight[0].numel() ** -0.5 / 0.87962566103423978  # of the uncut normal
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)


def build(
    name: str,
    *,
    image_size: int,
    in_channels: int = 3,
    width: int = 1,
    sk_ratio: float = 0.0625,
    zero_init_residual: bool = True,
) -> nn.Module:
    """The encoder of that name. Raises ValueError for a name that has no such form."""
    if name not in LAYERS:
        raise ValueError(
            f"selective kernels and width are for {', '.join(LAYERS)}; got backbone {name!r}"
        )
    return SelectiveResNet(
        LAYERS[name],
        in_channels=in_channels,
        width=width,
        sk_ratio=sk_ratio,
        image_size=image_size,
        zero_init_residual=zero_init_residual,
    )
