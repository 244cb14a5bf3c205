"""The operations that augmentation recipes are lists of.

Each draws its parameters for B images (`draw`) and applies them to a batch (`batch`, pixels.py) or
to one image (`single`, torchvision and Pillow: the obvious version, and that for large files). The
same parameters give the same image either way. All randomness comes from the generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from fastcl.data import pixels


class Operation:
    """One step of a list. Parameters: tensors, in tuples or not, whose dimension 0 is the image."""

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        """The parameters of `count` images of height × width. None by default."""
        return ()

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        """Applied to float32 images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        """Applied to one image (3, H, W); by torchvision where it has the operation."""
        return self.batch(as_float(image)[None], select(parameters, None))[0]


def select(parameters: Any, images: Tensor | slice | int | None) -> Any:
    """The parameters of some of the images; None adds dimension 0 to those of one."""
    if isinstance(parameters, Tensor):
        return parameters[images]
    return tuple(select(p, images) for p in parameters)


def as_float(images: Tensor) -> Tensor:
    """uint8 in 0 … 255 to float32 in 0 … 1; float images as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def uniform(
    shape: int | tuple[int, ...], low: float | Tensor, high: float | Tensor, generator: Generator
) -> Tensor:
    """Numbers in [low, high)."""
    size = (shape,) if isinstance(shape, int) else shape
    return torch.rand(size, generator=generator) * (high - low) + low


def below(bound: Tensor, generator: Generator) -> Tensor:
    """Integers in [0, bound), one for each entry of `bound`."""
    return (torch.rand(bound.shape, generator=generator, dtype=torch.float64) * bound).long()


@dataclass(frozen=True)
class Sometimes(Operation):
    """Another operation with a probability, else the image as it is."""

    probability: float
    operation: Operation

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        chosen = torch.rand(count, generator=generator) < self.probability
        return chosen, self.operation.draw(count, height, width, generator)

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        chosen, inner = parameters
        rows = chosen.nonzero()[:, 0]
        if len(rows) == 0:
            return images
        changed = self.operation.batch(images[rows], select(inner, rows))
        return images.index_copy(0, rows, changed)

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        chosen, inner = parameters
        return self.operation.single(image, inner) if chosen else image


@dataclass(frozen=True)
class Crop(Operation):
    """A random part of the image, resized to size × size: torchvision's RandomResizedCrop.

    area ~ U(scale) · H·W, log(width/height) ~ U(log ratio); the first of ten attempts that fits in
    the image, else the largest central crop whose ratio is allowed.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    kernel: str = "bilinear"
    antialias: bool = True

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        """top, left, height and width of the crop: int64 (B,) each."""
        area = uniform((count, 10), *self.scale, generator) * (height * width)
        low, high = map(math.log, self.ratio)
        ratio = uniform((count, 10), low, high, generator).exp()
        w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        found, (h, w) = first(fits, h, w)
        top, left = below(height - h + 1, generator), below(width - w + 1, generator)
        central_h = min(height, round(width / self.ratio[0]))
        central_w = min(width, round(height * self.ratio[1]))
        central = ((height - central_h) // 2, (width - central_w) // 2, central_h, central_w)
        return tuple(torch.where(found, a, b) for a, b in zip((top, left, h, w), central))

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        top, left, h, w = parameters
        height, width = images.shape[-2:]
        how: Any = {"kernel": self.kernel, "antialias": self.antialias}
        rows = pixels.crop_matrix(top, h, height, self.size, **how)
        columns = pixels.crop_matrix(left, w, width, self.size, **how)
        return pixels.separable(images, rows, columns).clamp_(0, 1)  # the cubic overshoots

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        top, left, h, w = map(int, parameters)
        image = as_float(image[:, top : top + h, left : left + w])
        if not self.antialias:  # torchvision's cubic is another one then (a = −3/4)
            whole = torch.tensor([[0], [0], [h], [w]])
            return self.batch(image[None], tuple(whole))[0]
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        mode, size = InterpolationMode(self.kernel), [self.size, self.size]
        resized: Tensor = tv.resize(image, size, mode, antialias=True)
        return resized.clamp_(0, 1)


def first(valid: Tensor, *values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first valid attempt (B, attempts): (is there one (B,), the values of it (B,))."""
    attempt = valid.to(torch.uint8).argmax(1, keepdim=True)
    return valid.any(1), tuple(value.gather(1, attempt)[:, 0] for value in values)


@dataclass(frozen=True)
class CropTensorFlow(Crop):
    """The same by tf.image.sample_distorted_bounding_box on the whole image, as SimCLR calls it.

    width/height ~ U(ratio), and the height is uniform over those that the area allows, so the area
    is not. At least min_object_covered = 10 % of the image remains. A hundred attempts, then the
    whole image. Bicubic, not antialiased.
    """

    kernel: str = "bicubic"
    antialias: bool = False

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        low, high = (scale * height * width for scale in self.scale)
        ratio = uniform((count, 100), *self.ratio, generator)
        fitting = ((width + 0.5 - 1e-7) / ratio).floor()  # the most with round(h · ratio) <= width
        most = torch.minimum((high / ratio).sqrt().round(), fitting).clamp_(max=height).long()
        least = torch.minimum((low / ratio).sqrt().round().long(), most)
        h = least + below(most - least + 1, generator)
        w = (h * ratio).round().long()
        least_area = max(low, 0.1 * height * width)
        fits = (h * w >= least_area) & (h * w <= high) & (w > 0) & (w <= width)
        found, (h, w) = first(fits, h, w)
        h, w = torch.where(found, h, height), torch.where(found, w, width)
        return below(height - h + 1, generator), below(width - w + 1, generator), h, w


@dataclass(frozen=True)
class CropBYOL(Crop):
    """BYOL's: one attempt, whose sides are cut to the image's. Bicubic, not antialiased."""

    kernel: str = "bicubic"
    antialias: bool = False

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        area = uniform(count, *self.scale, generator) * (height * width)
        low, high = map(math.log, self.ratio)
        ratio = uniform(count, low, high, generator).exp()
        w = (area * ratio).sqrt().round().long().clamp_(1, width)
        h = (area / ratio).sqrt().round().long().clamp_(1, height)
        return below(height - h + 1, generator), below(width - w + 1, generator), h, w


@dataclass(frozen=True)
class CropSquare(Crop):
    """A window of the image squeezed to a square: √a of its height and of its width, a ~ U(scale).

    CPC's crop of 256 × 256 pixels out of 300 × 300 has a = (256/300)².
    """

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        side = uniform(count, *self.scale, generator).sqrt()
        h, w = ((side * n).round().long().clamp_(1, n) for n in (height, width))
        return below(height - h + 1, generator), below(width - w + 1, generator), h, w


@dataclass(frozen=True)
class Flip(Operation):
    """Left and right exchanged."""

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        return images.flip(-1)


@dataclass(frozen=True)
class Grayscale(Operation):
    """Luma in all three channels."""

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        return pixels.grayscale(images)

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        luma: Tensor = tv.rgb_to_grayscale(image, num_output_channels=3)
        return luma


@dataclass(frozen=True)
class Solarize(Operation):
    """The bright half inverted: x < ½ ? x : 1 − x. Pillow's, with threshold 128, is the same."""

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        return torch.where(images < 0.5, images, 1 - images)


@dataclass(frozen=True)
class Jitter(Operation):
    """Brightness, contrast, saturation, hue by random amounts in random order: ColorJitter.

    Factors ~ U(max(0, 1 − a), 1 + a), the hue's turn ~ U(−hue, hue).
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def steps(self) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
        return pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue

    def ranges(self) -> list[tuple[float, float]]:
        """(lowest, highest) amount of each step."""
        factors = (self.brightness, self.contrast, self.saturation)
        return [*((max(0.0, 1 - a), 1 + a) for a in factors), (-self.hue, self.hue)]

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        """The order of the steps, int64 (B, 4), and the amount of each step, float32 (B, 4)."""
        order = torch.rand(count, 4, generator=generator).argsort(1)
        low, high = torch.tensor(self.ranges()).unbind(1)
        return order, uniform((count, 4), low, high, generator)

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        order, amounts = parameters
        images = images.clone()
        for turn in order.unbind(1):
            for step, function in enumerate(self.steps()):
                rows = (turn == step).nonzero()[:, 0]
                images[rows] = function(images[rows], amounts[rows, step])
        return images

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
        order, amounts = parameters
        for step in order.tolist():
            image = steps[step](image, float(amounts[step]))
        return image


@dataclass(frozen=True)
class JitterTensorFlow(Jitter):
    """The same in TensorFlow's terms. `additive`: brightness adds U(−a, a), else it multiplies."""

    additive: bool = False

    def steps(self) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
        brightness = pixels.add_brightness if self.additive else pixels.brightness
        return brightness, pixels.contrast_by_channel, pixels.saturation_hsv, pixels.hue

    def ranges(self) -> list[tuple[float, float]]:
        brightness, *others = super().ranges()
        return [(-self.brightness, self.brightness) if self.additive else brightness, *others]

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        return Operation.single(self, image, parameters)  # torchvision has none of these


@dataclass(frozen=True)
class Blur(Operation):
    """SimCLR's Gaussian blur, σ ~ U(0.1, 2): zeros beyond the border.

    The kernel is a tenth of the height, made odd: 23 taps at 224 pixels, 3 at 32.
    """

    sigma: tuple[float, float] = (0.1, 2.0)

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        return uniform(count, *self.sigma, generator)

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        height, width = images.shape[-2:]
        radius = height // 10 // 2
        rows = pixels.gaussian_matrix(parameters, radius, height)
        return pixels.separable(images, rows, pixels.gaussian_matrix(parameters, radius, width))


@dataclass(frozen=True)
class BlurPillow(Blur):
    """Pillow's GaussianBlur, radius σ ~ U(0.1, 2), as MoCo v2 and SwAV call it."""

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        height, width = images.shape[-2:]
        rows = pixels.pillow_blur_matrix(parameters, height)
        return pixels.separable(images, rows, pixels.pillow_blur_matrix(parameters, width))

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        from PIL import ImageFilter
        from torchvision.transforms.v2 import functional as tv

        picture = tv.to_pil_image((as_float(image) * 255).round_().to(torch.uint8))
        blurred = picture.filter(ImageFilter.GaussianBlur(float(parameters)))
        return as_float(tv.pil_to_tensor(blurred))
