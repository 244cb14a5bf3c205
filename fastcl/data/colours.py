"""Colour spaces that an encoder can be shown instead of RGB: grey, CIE Lab and YCbCr.

    Lab      L = 116 f(Y) − 16,   a = 500 (f(X) − f(Y)),   b = 200 (f(Y) − f(Z))
             f(t) = t^(1/3) above 0.008856, else 7.787 t + 16/116;  X, Y, Z over the white of D65
    YCbCr    16 … 235 and 16 … 240, as for video: ITU-R 601

Channel 0 is lightness in both, the others are colour. The same numbers as scikit-image's rgb2lab
and rgb2ycbcr, which CMC (Tian et al. 2020, arXiv:1906.05849) calls, and normalised as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.data.pixels import LUMA, gray

CHANNELS = {"rgb": 3, "grey": 1, "lab": 3, "ycbcr": 3}
Three = tuple[float, float, float]
NORMS: dict[str, tuple[Three, Three]] = {  # mean and standard deviation
    "lab": ((50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),  # half of the range each way
    "ycbcr": ((116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
}

XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = (0.95047, 1.0, 1.08883)  # D65, seen under 2°
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
YCBCR_ZERO = (16.0, 128.0, 128.0)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] -> L in 0 … 100, a and b in about −110 … 110."""
    check_rgb(images)
    linear = torch.where(
        images > 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92
    )
    t = _mix(linear, XYZ) / _column(WHITE, images)
    f = torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def rgb_to_ycbcr(images: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] -> Y in 16 … 235, Cb and Cr in 16 … 240."""
    check_rgb(images)
    return _mix(images, YCBCR) + _column(YCBCR_ZERO, images)


def convert(images: Tensor, colours: str, mean: Three | None, std: Three | None) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] in another space, normalised: (B, CHANNELS[colours], H, W).

    rgb and grey are normalised by mean and std, of RGB in [0, 1], or stay in [0, 1] without; Lab
    and YCbCr by their own.
    """
    if colours in NORMS:
        mean, std = NORMS[colours]
        images = (rgb_to_lab if colours == "lab" else rgb_to_ycbcr)(images)
    elif colours == "grey":
        check_rgb(images)
        images = gray(images)
        if mean is not None and std is not None:
            luma = [sum(w * v for w, v in zip(LUMA, three, strict=True)) for three in (mean, std)]
            return (images - luma[0]) / luma[1]
    if mean is None or std is None:
        return images
    return (images - _column(mean, images)) / _column(std, images)


def check_rgb(images: Tensor) -> None:
    """Raises ValueError unless there are three channels."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"colour spaces are made of RGB images (B, 3, H, W); got {tuple(images.shape)}"
        )


def is_grey(images: Tensor) -> bool:
    """Whether no pixel of images (B, C, H, W) has a colour."""
    return images.shape[1] == 1 or bool((images == images[:, :1]).all())


def _mix(images: Tensor, matrix: tuple[Three, ...]) -> Tensor:
    """Each pixel's three channels times a 3 × 3 matrix."""
    weight = torch.tensor(matrix, dtype=images.dtype, device=images.device)
    return torch.einsum("ic,bchw->bihw", weight, images)


def _column(three: Three, images: Tensor) -> Tensor:
    return torch.tensor(three, dtype=images.dtype, device=images.device)[:, None, None]
