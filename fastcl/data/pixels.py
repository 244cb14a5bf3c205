"""Image operations on a batch, each image with its own parameter.

Images are float32 (B, 3, H, W) in [0, 1]; a parameter is a vector (B,). No function here is random. Resizing and
blurring are linear in rows and in columns, so each is one matrix for the rows and one for the columns of every image:

    out_b = R_b · image_b · C_bᵀ                     R (B, h, H), C (B, w, W)

The colour operations exist in two forms that differ in the mean that contrast keeps and in the colour space of
saturation: torchvision's (MoCo, SwAV, …) and TensorFlow's (SimCLR, BYOL). All clip to [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as rounded by both frameworks


def _column(parameter: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return parameter[:, None, None, None]


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows_b · image_b · columns_bᵀ for every image and channel: (B, C, H, W) -> (B, C, h, w)."""
    count, channels, height, width = images.shape
    wide = images.reshape(count, channels * height, width) @ columns.transpose(1, 2)
    wide = wide.view(count, channels, height, -1)
    return torch.stack([torch.bmm(rows, wide[:, c]) for c in range(channels)], 1)


# Resizing: the matrix of one axis


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min_(0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = −1/2, as Pillow, torchvision (antialiased) and TensorFlow have it."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


KERNELS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}  # name: (kernel, half width)


def crop_matrix(
    start: Tensor, extent: Tensor, source: int, size: int, *, kernel: str, antialias: bool
) -> Tensor:
    """The resampling of pixels start … start + extent of an axis to `size` pixels.

        M_ij ∝ k((start + s·(i + ½) − (j + ½)) / max(s, 1)),      s = extent/size, Σ_j M_ij = 1, j inside the crop

    Without `antialias` the kernel is not widened where s > 1 (TensorFlow's default). start, extent: integer (B,).
    Returns (B, size, source).
    """
    function, half_width = KERNELS[kernel]
    start, extent = start.float()[:, None, None], extent.float()[:, None, None]
    scale = extent / size
    stretch = scale.clamp_min(1) if antialias else torch.ones_like(scale)
    i = torch.arange(size, device=start.device)[:, None] + 0.5
    j = torch.arange(source, device=start.device) + 0.5  # pixel centres
    distance = (start + scale * i - j) / stretch  # (B, size, source)
    weight = function(distance)
    inside = (j > start) & (j < start + extent) & (distance.abs() < half_width)
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


# Blurring: the matrix of one axis


def gaussian_matrix(sigma: Tensor, radius: int, size: int) -> Tensor:
    """SimCLR's blur: 2·radius + 1 taps of a Gaussian that sum to 1, zeros beyond the border. (B, size, size)."""
    offset = torch.arange(size, device=sigma.device)
    offset = offset[:, None] - offset  # (size, size)
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    exponent = -0.5 / sigma[:, None].square()  # (B, 1)
    total = torch.exp(taps.square() * exponent).sum(1)  # (B,)
    weight = torch.exp(offset.square() * exponent[:, :, None])
    return weight * (offset.abs() <= radius) / total[:, None, None]


def pil_blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """Pillow's GaussianBlur(radius=sigma): three box blurs of fractional radius r, the border extended.

        r = l + a,   l = ⌊(L − 1)/2⌋,   L = √(4σ² + 1),
        a = (2l + 1)(l(l + 1) − σ²) / (6 (σ²/3 − (l + 1)²))

    which has the Gaussian's variance. A box weights |offset| ≤ l with 1/(2r + 1) and |offset| = l + 1 with a/(2r + 1).
    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".
    (B, size, size).
    """
    variance = sigma.square()
    whole = ((torch.sqrt(4 * variance + 1) - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - variance)
    part = part / (6 * (variance / 3 - (whole + 1).square()))
    whole, part = whole[:, None, None], part[:, None, None]
    reach = int(whole.max()) + 1 if len(sigma) else 0
    pixel = torch.arange(size, device=sigma.device)[:, None]
    box = torch.zeros(len(sigma), size, size, device=sigma.device)
    for offset in range(-reach, reach + 1):
        weight = (part + whole + 1 - abs(offset)).clamp(0, 1)  # 1 within l, a at l + 1, 0 beyond
        source = (pixel + offset).clamp(0, size - 1)  # the border pixel, repeated
        box.scatter_add_(2, source.expand(len(sigma), -1, -1), weight.expand(-1, size, -1))
    box /= 2 * (whole + part) + 1
    return box @ box @ box


# Colour


def gray(images: Tensor) -> Tensor:
    """Luma, (B, 1, H, W)."""
    red, green, blue = images.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor · images + (1 − factor) · other, clipped."""
    return torch.lerp(other.expand_as(images), images, _column(factor)).clamp_(0, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor · x. torchvision's adjust_brightness."""
    return (images * _column(factor)).clamp_(0, 1)


def add_brightness(images: Tensor, delta: Tensor) -> Tensor:
    """x + delta. tf.image.adjust_brightness."""
    return (images + _column(delta)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean luma. torchvision's adjust_contrast."""
    return _blend(images, gray(images).mean((1, 2, 3), keepdim=True), factor)


def contrast_by_channel(images: Tensor, factor: Tensor) -> Tensor:
    """Away from each channel's own mean. tf.image.adjust_contrast."""
    return _blend(images, images.mean((2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Away from the pixel's luma. torchvision's adjust_saturation."""
    return _blend(images, gray(images), factor)


def saturation_hsv(images: Tensor, factor: Tensor) -> Tensor:
    """S of HSV times factor, at most 1. tf.image.adjust_saturation.

    Hue and value stay, so each channel's distance to the value V is scaled: V − (V − x) · min(factor, V/(V − min)).
    """
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    limit = value / (value - low).clamp_min_(1e-12)
    return value - (value - images) * torch.minimum(_column(factor), limit)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """The hue moved by `turn` of the colour circle, saturation and value kept. (torchvision and TensorFlow agree.)

    With V the largest channel, C = V − the smallest, and the hue h in sixths of the circle,
    channel n = V − C · clamp(min(k, 4 − k), 0, 1),  k = (n + h + 6·turn) mod 6,  n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(1)  # (B, H, W)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
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
    """Luma in all three channels."""
    return gray(images).expand_as(images)
