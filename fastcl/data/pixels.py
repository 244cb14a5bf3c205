"""Image operations on a batch, each image with its own parameter.

Images are float32 (B, 3, H, W) in [0, 1]; a parameter is a vector (B,). Nothing here is random.
Resizing and blurring are linear in the rows and in the columns, so each is two matrices an image:

    out_b = R_b · image_b · C_bᵀ                     R (B, h, H), C (B, w, W)

The colour operations exist in two forms, which differ in the mean that contrast keeps and in the
space of saturation: torchvision's (MoCo, SwAV, …) and TensorFlow's (SimCLR, BYOL).
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as both frameworks round it


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows_b · image_b · columns_bᵀ of every channel: (B, C, H, W) -> (B, C, h, w)."""
    count, channels, height, width = images.shape
    wide = images.reshape(count, channels * height, width) @ columns.transpose(1, 2)
    wide = wide.view(count, channels, height, -1)
    return torch.stack([torch.bmm(rows, wide[:, c]) for c in range(channels)], 1)


# Resizing: the matrix of one axis


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = −1/2: Pillow's, TensorFlow's, and torchvision's when it antialiases."""
    x = x.abs().clamp_(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2  # 0 at x = 2
    return torch.where(x < 1, near, far)


KERNELS = {"bilinear": _triangle, "bicubic": _cubic}


def crop_matrix(
    start: Tensor, extent: Tensor, source: int, size: int, *, kernel: str, antialias: bool
) -> Tensor:
    """The resampling of the pixels start … start + extent of an axis to `size` pixels.

        M_ij ∝ k((start + s·(i + ½) − (j + ½)) / max(s, 1)),     s = extent/size,
        Σ_j M_ij = 1, j inside the crop only

    Without `antialias` the kernel is not widened where s > 1, as in TensorFlow.
    start and extent are integer (B,). Returns (B, size, source).
    """
    start, extent = start.float()[:, None, None], extent.float()[:, None, None]
    scale = extent / size
    i = torch.arange(size, device=start.device)[:, None] + 0.5
    j = torch.arange(source, device=start.device) + 0.5  # pixel centres
    distance = start + scale * i - j  # (B, size, source)
    if antialias:
        distance /= scale.clamp(min=1)
    weight = KERNELS[kernel](distance) * ((j > start) & (j < start + extent))
    return weight / weight.sum(2, keepdim=True)


# Blurring: the matrix of one axis


def gaussian_matrix(sigma: Tensor, radius: int, size: int) -> Tensor:
    """SimCLR's blur: 2·radius + 1 taps of a Gaussian, their sum 1, and zeros beyond the border.

    sigma (B,). Returns (B, size, size).
    """
    pixel = torch.arange(size, device=sigma.device)
    offset = pixel[:, None] - pixel  # (size, size)
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    exponent = -0.5 / sigma.square()[:, None]  # (B, 1)
    total = torch.exp(exponent * taps.square()).sum(1)  # (B,)
    weight = torch.exp(exponent[:, :, None] * offset.square())
    return weight * (offset.abs() <= radius) / total[:, None, None]


def pillow_blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """Pillow's GaussianBlur(radius=σ): three box blurs of fractional radius l + a, border extended.

        l = ⌊(√(4σ² + 1) − 1)/2⌋,   a = (2l + 1)(l(l + 1) − σ²) / (6 (σ²/3 − (l + 1)²))

    which together have the variance σ². A box gives 1/(2(l + a) + 1) to offsets up to l, a times
    that to l + 1. Source: Gwosdek et al. 2011, "Theoretical Foundations of Gaussian Convolution by
    Extended Box Filtering". sigma (B,). Returns (B, size, size).
    """
    variance = sigma.square()[:, None, None]
    whole = ((torch.sqrt(4 * variance + 1) - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - variance)
    part /= 6 * (variance / 3 - (whole + 1).square())
    reach = int(whole.max()) + 1
    pixel = torch.arange(size, device=sigma.device)[:, None]
    box = torch.zeros(len(sigma), size, size, device=sigma.device)
    for offset in range(-reach, reach + 1):
        weight = (part + whole + 1 - abs(offset)).clamp(0, 1)  # 1 up to l, a at l + 1, 0 beyond
        source = (pixel + offset).clamp(0, size - 1)  # beyond the border: the border's pixel
        box.scatter_add_(2, source.expand(len(sigma), -1, 1), weight.expand(-1, size, 1))
    box /= 2 * (whole + part) + 1
    return box @ box @ box


# Colour


def gray(images: Tensor) -> Tensor:
    """Luma: (B, 3, H, W) -> (B, 1, H, W)."""
    luma = images[:, 0:1] * LUMA[0]
    return luma.add_(images[:, 1:2], alpha=LUMA[1]).add_(images[:, 2:3], alpha=LUMA[2])


def _of_image(parameter: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return parameter[:, None, None, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor · images + (1 − factor) · other, clipped to [0, 1]."""
    return torch.lerp(other.expand_as(images), images, _of_image(factor)).clamp_(0, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor · x, clipped: torchvision's adjust_brightness."""
    return (images * _of_image(factor)).clamp_(0, 1)


def add_brightness(images: Tensor, delta: Tensor) -> Tensor:
    """x + delta, clipped: tf.image.adjust_brightness."""
    return (images + _of_image(delta)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean luma: torchvision's adjust_contrast."""
    return _blend(images, gray(images).mean((1, 2, 3), keepdim=True), factor)


def contrast_by_channel(images: Tensor, factor: Tensor) -> Tensor:
    """Away from each channel's own mean: tf.image.adjust_contrast, clipped."""
    return _blend(images, images.mean((2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the pixel's luma: torchvision's adjust_saturation."""
    return _blend(images, gray(images), factor)


def saturation_hsv(images: Tensor, factor: Tensor) -> Tensor:
    """HSV's saturation times factor, at most 1: tf.image.adjust_saturation.

    Hue and the value V = max stay, so the distances to V scale:
    V − (V − x) · min(factor, V/(V − min)).
    """
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    most = value / (value - low).clamp_(min=1e-12)  # there the smallest channel is 0
    return (value - (value - images) * torch.minimum(_of_image(factor), most)).clamp_(0, 1)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """The hue moved by `turn` circles, saturation and value kept: adjust_hue of both frameworks.

    With V the largest channel, C = V − the smallest, h the hue in sixths of the circle:
    channel_n = V − C · clamp(min(k, 4 − k), 0, 1),   k = (n + h + 6·turn) mod 6,   n = 5, 3, 1.
    """
    red, green, blue = images.unbind(1)  # (B, H, W)
    value = images.amax(1)
    chroma = value - images.amin(1)
    scale = 1 / torch.where(chroma > 0, chroma, 1)
    h = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    h += 6 * turn[:, None, None]
    out = torch.empty_like(images)
    for channel, n in enumerate((5, 3, 1)):
        k = (h + n).remainder_(6)
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, chroma, k, value=-1, out=out[:, channel])
    return out


def grayscale(images: Tensor) -> Tensor:
    """Luma in all three channels: (B, 3, H, W)."""
    return gray(images).expand_as(images)
