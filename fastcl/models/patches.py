"""Encoders of a part at a time, for CPC: patches of an image, windows of a sound.

    grid      (N, T, W, D): a latent for each part, T in the order of prediction (rows, or time)
    forward   (N, D): their mean

Source: van den Oord et al. 2018, arXiv:1807.03748.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nf


class PatchEncoder(nn.Module):
    """images (N, C, S, S): an encoder's features of overlapping patches.

    In training each patch shows a window of it at random, in evaluation the central one, with the
    mean colour (0) around: the paper's 60 × 60 of 64 × 64 pixels.

    jitter   in training patch ← a · patch + b, a ~ U(1 − jitter, 1 + jitter), b ~ U(−jitter,
             jitter), so that an image is not known by its tones. The paper has none; its successor
             (Hénaff et al. 2019, arXiv:1905.09272) changes the colours of each patch.
    """

    def __init__(
        self, encoder: nn.Module, patch: int, stride: int, window: int, jitter: float = 0.0
    ) -> None:
        super().__init__()
        if not 1 <= window <= patch:
            raise ValueError(f"window must be in 1 … patch ({patch}); got {window}")
        self.encoder, self.patch, self.stride, self.window = encoder, patch, stride, window
        self.jitter = jitter
        self.feature_dim = cast(int, encoder.feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.grid(images).mean((1, 2))

    def grid(self, images: Tensor) -> Tensor:
        """images (N, C, S, S) -> (N, rows, columns, D)."""
        p, s = self.patch, self.stride
        if min(images.shape[-2:]) < p:
            raise ValueError(f"images must be of {p} pixels or more; got {tuple(images.shape)}")
        patches = images.unfold(2, p, s).unfold(3, p, s).permute(0, 2, 3, 1, 4, 5)
        count, rows, columns = patches.shape[:3]
        z: Tensor = self.encoder(self.windows(self.jittered(patches.flatten(0, 2))))
        return z.view(count, rows, columns, -1)

    def jittered(self, patches: Tensor) -> Tensor:
        """Patches (P, C, p, p), each with a contrast and brightness of its own in training."""
        if not self.training or self.jitter == 0:
            return patches
        size = (len(patches), 1, 1, 1)
        a, b = (2 * torch.rand(size, device=patches.device) - 1 for _ in range(2))
        return ((1 + self.jitter * a) * patches + self.jitter * b).to(patches.dtype)

    def windows(self, patches: Tensor) -> Tensor:
        """A window of each of the patches (P, C, p, p), in the middle of as many pixels."""
        room = self.patch - self.window
        if room == 0:
            return patches
        size, device = (len(patches), 1), patches.device
        if self.training:
            top, left = (torch.randint(room + 1, size, device=device) for _ in range(2))
        else:
            top = left = torch.full(size, room // 2, device=device)
        pixel = torch.arange(self.window, device=device)
        which = torch.arange(len(patches), device=device)[:, None, None]
        seen = patches[which, :, (top + pixel)[:, :, None], (left + pixel)[:, None, :]]
        before = room // 2
        return nf.pad(seen.permute(0, 3, 1, 2), (before, room - before) * 2)


class AudioEncoder(nn.Module):
    """Sound (N, 1, samples): five convolutions with ReLU, one latent for each 160 samples.

    The paddings (3, 2, 1, 1, 1), which the paper does not give, make it exactly one for each.
    """

    kernels, strides = (10, 8, 4, 4, 4), (5, 4, 2, 2, 2)

    def __init__(self, dim: int = 512) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
            inputs = dim if i else 1
            parts += [nn.Conv1d(inputs, dim, kernel, stride, padding=(kernel - stride + 1) // 2)]
            parts += [nn.ReLU()]
        self.layers = nn.Sequential(*parts)
        self.feature_dim = dim

    def forward(self, sound: Tensor) -> Tensor:
        return self.grid(sound).mean((1, 2))

    def grid(self, sound: Tensor) -> Tensor:
        """(N, 1, samples) -> (N, samples / 160, 1, dim)."""
        z: Tensor = self.layers(sound)  # (N, dim, T)
        return z.transpose(1, 2)[:, :, None]


class Bottleneck(nn.Module):
    """x + conv(relu(conv(relu(conv(relu x))))): pre-activated, without normalisation.

    Source: He et al. 2016, arXiv:1603.05027, figure 4e.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width // 4, 1)
        self.conv2 = nn.Conv2d(width // 4, width // 4, 3, stride, padding=1)
        self.conv3 = nn.Conv2d(width // 4, width, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != width:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = nf.relu(x)
        y = nf.relu(self.conv2(nf.relu(self.conv1(active))))
        return (x if self.shortcut is None else self.shortcut(active)) + self.conv3(y)


class PlainResNet(nn.Module):
    """The first stages of a ResNet v2 without batch norm: patches (P, C, p, p) -> (P, widths[-1]).

    CPC's is ResNet-v2-101 to its third stage: 1,024 features of 64 × 64 pixels. Patches of at most
    32 pixels get a stem of 3 × 3, stride 1, without max-pool.

    Without norms the sum of L branches would grow with L: the last convolution of each starts
    divided by √L. The paper does not say how it starts.
    """

    def __init__(
        self,
        in_channels: int,
        patch: int,
        blocks: Sequence[int] = (3, 4, 23),
        widths: Sequence[int] = (256, 512, 1024),
        stem: int = 64,
    ) -> None:
        super().__init__()
        small = patch <= 32
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, stem, 3, padding=1)
            if small
            else nn.Conv2d(in_channels, stem, 7, 2, padding=3)
        ]
        if not small:
            layers.append(nn.MaxPool2d(3, 2, padding=1))
        inputs = stem
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for i in range(count):
                layers.append(Bottleneck(inputs, width, 2 if stage > 0 and i == 0 else 1))
                inputs = width
        self.layers = nn.Sequential(*layers)
        self.feature_dim = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    module.conv3.weight.div_(sum(blocks) ** 0.5)
        self.to(memory_format=torch.channels_last)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.layers(patches.contiguous(memory_format=torch.channels_last))
        return nf.relu(x).mean((2, 3))
