"""Random views of images: every method's list of operations, in its own order.

    recipe = augment.build("moco-v2", image_size=32, mean=data.mean, std=data.std)
    first, second = recipe.views(images, generator)      images uint8 (B, 3, H, W) -> float32 (B, 3, 32, 32) each
    first, second = recipe.views_of(image, generator)    one image of any size, through torchvision: for big files

An operation draws its parameters for B images (`draw`), and applies them to a batch (`batch`, pixels.py) or to one image
(`single`, torchvision and Pillow, the slow obvious version). Both give the same image for the same parameters. All randomness
comes from the generator. Source: each recipe names its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from fastcl.data import pixels
from fastcl.data.splits import IMAGENET_STD

CHUNK = 64  # images that go through the list together: they stay in the second-level cache


class Operation:
    """One step of a list. Parameters are tensors, nested in tuples, whose first dimension is the image."""

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        """The parameters of `count` images of height × width."""
        raise NotImplementedError

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        """Applied to float32 images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        """Applied to one image (3, H, W), with parameters of one image. Where torchvision has the operation, by torchvision."""
        return self.batch(image[None], _of(parameters, None))[0]


def _of(parameters: Any, images: Tensor | slice | int | None) -> Any:
    """The parameters of some of the images."""
    if isinstance(parameters, Tensor):
        return parameters[images]
    return tuple(_of(p, images) for p in parameters)


def _below(bound: Tensor, generator: Generator) -> Tensor:
    """Integers in [0, bound), one for each entry of bound."""
    return (torch.rand(bound.shape, generator=generator, dtype=torch.float64) * bound).long()


def _first_valid(valid: Tensor, *values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first valid attempt in each row (B, attempts): (whether there is one (B,), the values (B,))."""
    first = valid.to(torch.uint8).argmax(1, keepdim=True)
    return valid.any(1), tuple(value.gather(1, first)[:, 0] for value in values)


@dataclass(frozen=True)
class Crop(Operation):
    """A random part of the image, resized to size × size: torchvision's RandomResizedCrop.

    area ~ U(scale) · H·W, log(width/height) ~ U(log ratio); ten attempts, then the largest central crop of an admitted ratio.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    kernel: str = "bilinear"
    antialias: bool = True

    ATTEMPTS = 10

    def draw(self, count: int, height: int, width: int, generator: Generator) -> tuple[Tensor, ...]:
        """top, left, height, width: int64 (B,)."""
        shape = (count, self.ATTEMPTS)
        area = torch.rand(shape, generator=generator) * (self.scale[1] - self.scale[0])
        area = (area + self.scale[0]) * (height * width)
        low, high = map(math.log, self.ratio)
        aspect = torch.exp(torch.rand(shape, generator=generator) * (high - low) + low)
        w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        found, (h, w) = _first_valid((0 < w) & (w <= width) & (0 < h) & (h <= height), h, w)
        central_h, central_w = self._central(height, width)
        h, w = torch.where(found, h, central_h), torch.where(found, w, central_w)
        top, left = _below(height - h + 1, generator), _below(width - w + 1, generator)
        top = torch.where(found, top, (height - central_h) // 2)
        left = torch.where(found, left, (width - central_w) // 2)
        return top, left, h, w

    def _central(self, height: int, width: int) -> tuple[int, int]:
        if width / height < self.ratio[0]:
            return round(width / self.ratio[0]), width
        if width / height > self.ratio[1]:
            return height, round(height * self.ratio[1])
        return height, width

    def batch(self, images: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        top, left, h, w = parameters
        height, width = images.shape[-2:]
        options: Any = {"kernel": self.kernel, "antialias": self.antialias}
        rows = pixels.crop_matrix(top, h, height, self.size, **options)
        columns = pixels.crop_matrix(left, w, width, self.size, **options)
        out = pixels.separable(images, rows, columns)
        return out.clamp_(0, 1) if self.kernel == "bicubic" else out

    def single(self, image: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        top, left, h, w = (int(p) for p in parameters)
        image = _as_float(image[:, top : top + h, left : left + w])
        if not self.antialias:  # torchvision's cubic is another one there (a = −3/4)
            origin = torch.zeros(1, dtype=torch.int64)
            whole = (origin, origin, torch.tensor([h]), torch.tensor([w]))
            return self.batch(image[None], whole)[0]
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        size = [self.size, self.size]
        return tv.resize(image, size, InterpolationMode(self.kernel), antialias=True).clamp_(0, 1)


@dataclass(frozen=True)
class CropTensorFlow(Crop):
    """The same by tf.image.sample_distorted_bounding_box on the whole image, as SimCLR calls it.

    width/height ~ U(ratio), then the height is uniform among those that the area allows, so areas are not uniform; at least
    min_object_covered = 10 % of the image stays; a hundred attempts, then the whole image.
    """

    kernel: str = "bicubic"
    antialias: bool = False

    ATTEMPTS = 100
    COVERED = 0.1

    def draw(self, count: int, height: int, width: int, generator: Generator) -> tuple[Tensor, ...]:
        shape = (count, self.ATTEMPTS)
        low, high = (s * height * width for s in self.scale)
        aspect = torch.rand(shape, generator=generator) * (self.ratio[1] - self.ratio[0])
        aspect += self.ratio[0]
        least = (low / aspect).sqrt().round().long()
        most = torch.minimum(
            (high / aspect).sqrt().round().long(),
            ((width + 0.5 - 1e-7) / aspect).floor().long(),  # round(h · aspect) <= width
        ).clamp_max_(height)
        h = torch.minimum(least, most)
        h = h + _below((most - h + 1).clamp_min(1), generator)
        w = (h * aspect).round().long()
        area = h * w
        valid = (area >= max(low, self.COVERED * height * width)) & (area <= high)
        valid &= (0 < w) & (w <= width) & (h <= height)
        found, (h, w) = _first_valid(valid, h, w)
        h, w = torch.where(found, h, height), torch.where(found, w, width)
        return _below(height - h + 1, generator), _below(width - w + 1, generator), h, w


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
        return images.index_copy(0, rows, self.operation.batch(images[rows], _of(inner, rows)))

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        chosen, inner = parameters
        return self.operation.single(image, inner) if chosen else image


@dataclass(frozen=True)
class Flip(Operation):
    """Left and right exchanged."""

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        return ()

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        return images.flip(-1)


@dataclass(frozen=True)
class Grayscale(Operation):
    """Luma in all three channels."""

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        return ()

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        return pixels.grayscale(images)

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        return tv.rgb_to_grayscale(image, num_output_channels=3)


@dataclass(frozen=True)
class Jitter(Operation):
    """Brightness, contrast, saturation and hue, each by a random amount, in a random order: torchvision's ColorJitter.

    Factors ~ U(max(0, 1 − a), 1 + a), the hue's turn ~ U(−hue, hue).
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    STEPS = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Any:
        """order int64 (B, 4), amounts float32 (B, 4)."""
        low, high = torch.tensor(self.ranges()).unbind(1)
        order = torch.rand(count, 4, generator=generator).argsort(1)
        return order, torch.rand(count, 4, generator=generator) * (high - low) + low

    def ranges(self) -> list[tuple[float, float]]:
        """(lowest, highest) amount of each of STEPS."""
        factors = (self.brightness, self.contrast, self.saturation)
        return [*((max(0.0, 1 - a), 1 + a) for a in factors), (-self.hue, self.hue)]

    def batch(self, images: Tensor, parameters: Any) -> Tensor:
        order, amounts = parameters
        images = images.clone()
        for turn in order.unbind(1):
            for step, function in enumerate(self.STEPS):
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
    """The same in TensorFlow's terms: SimCLR v2 and, with its additive brightness ~ U(−a, a), v1."""

    additive: bool = False

    def ranges(self) -> list[tuple[float, float]]:
        brightness, *others = super().ranges()
        return [(-self.brightness, self.brightness) if self.additive else brightness, *others]

    @property
    def STEPS(self) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:  # type: ignore[override]
        brightness = pixels.add_brightness if self.additive else pixels.brightness
        return brightness, pixels.contrast_by_channel, pixels.saturation_hsv, pixels.hue

    def single(self, image: Tensor, parameters: Any) -> Tensor:
        return Operation.single(self, image, parameters)


@dataclass(frozen=True)
class Blur(Operation):
    """SimCLR's Gaussian blur: σ ~ U(0.1, 2), kernel a tenth of the height (22 -> 23 taps), zeros beyond the border."""

    sigma: tuple[float, float] = (0.1, 2.0)

    def draw(self, count: int, height: int, width: int, generator: Generator) -> Tensor:
        low, high = self.sigma
        return torch.rand(count, generator=generator) * (high - low) + low

    def batch(self, images: Tensor, parameters: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        radius = height // 10 // 2
        rows = pixels.gaussian_matrix(parameters, radius, height)
        columns = pixels.gaussian_matrix(parameters, radius, width)
        return pixels.separable(images, rows, columns)


@dataclass(frozen=True)
class BlurPillow(Blur):
    """Pillow's GaussianBlur with radius ~ U(0.1, 2): MoCo v2's and SwAV's."""

    def batch(self, images: Tensor, parameters: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows = pixels.pil_blur_matrix(parameters, height)
        columns = rows if width == height else pixels.pil_blur_matrix(parameters, width)
        return pixels.separable(images, rows, columns)

    def single(self, image: Tensor, parameters: Tensor) -> Tensor:
        from PIL import ImageFilter
        from torchvision.transforms.v2 import functional as tv

        picture = tv.to_pil_image(image).filter(ImageFilter.GaussianBlur(float(parameters)))
        return _as_float(tv.pil_to_tensor(picture))


def _as_float(images: Tensor) -> Tensor:
    """uint8 in 0 … 255 to float32 in 0 … 1; float images as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


@dataclass(frozen=True)
class Crops:
    """`count` views of size × size pixels that each cover the fraction `scale` of the image's area."""

    count: int
    size: int
    scale: tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """The views that a method takes of an image: for each a list of operations, then (x − mean)/std."""

    lists: tuple[tuple[Operation, ...], ...]
    mean: tuple[float, float, float] | None = None  # None: images stay in [0, 1]
    std: tuple[float, float, float] | None = None

    def views(self, images: Tensor, generator: Generator) -> list[Tensor]:
        """One float32 batch for each view, (B, 3, size, size), from images uint8 (B, 3, H, W), on their device."""
        return [self._view(operations, images, generator) for operations in self.lists]

    def views_of(self, image: Tensor, generator: Generator) -> list[Tensor]:
        """The same of one image uint8 (3, H, W) of any size: a list of (3, size, size)."""
        views = []
        for operations in self.lists:
            view = image
            for operation in operations:
                drawn = operation.draw(1, *view.shape[-2:], generator)
                view = operation.single(view, _of(drawn, 0))
            views.append(self.normalize(view[None])[0])
        return views

    def normalize(self, images: Tensor) -> Tensor:
        """What a test sees of images (B, 3, H, W), uint8 or float: in [0, 1], then (x − mean)/std where the method does it."""
        images = _as_float(images)
        if self.mean is None or self.std is None:
            return images
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        return (images - mean) / torch.tensor(self.std, device=images.device)[:, None, None]

    def _view(
        self, operations: tuple[Operation, ...], images: Tensor, generator: Generator
    ) -> Tensor:
        count, (height, width) = len(images), images.shape[-2:]
        drawn = []
        for operation in operations:
            drawn.append(_to(operation.draw(count, height, width, generator), images.device))
            if isinstance(operation, Crop):
                height = width = operation.size
        done = []
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            view = _as_float(images[part])
            for operation, parameters in zip(operations, drawn):
                view = operation.batch(view, _of(parameters, part))
            done.append(self.normalize(view))
        return torch.cat(done)


def _to(parameters: Any, device: torch.device) -> Any:
    if isinstance(parameters, Tensor):
        return parameters.to(device)
    return tuple(_to(p, device) for p in parameters)


# The lists. Each takes a view's size and scale, the strength of the colour jitter, and whether to blur.


def instdisc(size: int, scale: tuple[float, float], strength: float, blur: bool) -> list[Operation]:
    """InstDisc and MoCo v1. Source: Wu et al. 2018, arXiv:1805.01978, its code's main.py."""
    jitter = Jitter(*(0.4 * strength,) * 4)
    return [Crop(size, scale), Sometimes(0.2, Grayscale()), jitter, Sometimes(0.5, Flip())]


def simclr(
    size: int, scale: tuple[float, float], strength: float, blur: bool, additive: bool = False
) -> list[Operation]:
    """SimCLR. Source: Chen et al. 2020, arXiv:2002.05709, appendix A; its code's data_util.py."""
    strengths = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    return [
        CropTensorFlow(size, scale),
        Sometimes(0.5, Flip()),
        Sometimes(0.8, JitterTensorFlow(*strengths, additive=additive)),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(0.5, Blur())] if blur else []),
    ]


def simclr_v1(
    size: int, scale: tuple[float, float], strength: float, blur: bool
) -> list[Operation]:
    """As SimCLR's first release (commit be133b3): brightness is added, not multiplied."""
    return simclr(size, scale, strength, blur, additive=True)


def moco_v2(size: int, scale: tuple[float, float], strength: float, blur: bool) -> list[Operation]:
    """MoCo v2. Source: Chen et al. 2020, arXiv:2003.04297, its code's main_moco.py --aug-plus."""
    strengths = (0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    return [
        Crop(size, scale),
        Sometimes(0.8, Jitter(*strengths)),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(0.5, BlurPillow())] if blur else []),
        Sometimes(0.5, Flip()),
    ]


def swav(size: int, scale: tuple[float, float], strength: float, blur: bool) -> list[Operation]:
    """SwAV. Source: Caron et al. 2020, arXiv:2006.09882, its code's multicropdataset.py."""
    strengths = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    return [
        Crop(size, scale),
        Sometimes(0.5, Flip()),
        Sometimes(0.8, Jitter(*strengths)),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(0.5, BlurPillow())] if blur else []),
    ]


Recipe = Callable[[int, tuple[float, float], float, bool], list[Operation]]
RECIPES: dict[str, Recipe] = {
    "instdisc": instdisc,
    "moco-v1": instdisc,
    "simclr-v1": simclr_v1,
    "moco-v2": moco_v2,
    "simclr-v2": simclr,
    "swav": swav,
}
SCALES = {"simclr-v1": (0.08, 1.0), "simclr-v2": (0.08, 1.0)}  # two views; others (0.2, 1)
SWAV_CROPS = (Crops(2, 224, (0.14, 1.0)), Crops(6, 96, (0.05, 0.14)))  # its 2×224 + 6×96


def build(
    name: str,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    crops: Sequence[Crops] | None = None,
    strength: float = 1.0,
    blur: bool = True,
) -> Augmentation:
    """The augmentation of a method, by the method's name.

    crops      the views; None: the paper's: two of image_size, and for SwAV six small ones of 3/7 of it
    strength   multiplies the colour jitter
    blur       False leaves out the blur where the method has one, as is usual for small images
    mean, std  the data set's. SimCLR does not normalise and leaves them unused. SwAV's code has 0.228 where ImageNet's std
               is 0.229; that is kept.
    Raises ValueError for an unknown name, with the list.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown augmentation {name!r}. Augmentations: {', '.join(RECIPES)}")
    if crops is None and name == "swav":
        crops = [replace(c, size=round(c.size * image_size / 224)) for c in SWAV_CROPS]
    elif crops is None:
        crops = [Crops(2, image_size, SCALES.get(name, (0.2, 1.0)))]
    lists = [
        tuple(RECIPES[name](c.size, c.scale, strength, blur)) for c in crops for _ in range(c.count)
    ]
    if name.startswith("simclr"):
        return Augmentation(tuple(lists))
    if name == "swav" and std == IMAGENET_STD:
        std = (0.228, *IMAGENET_STD[1:])
    return Augmentation(tuple(lists), mean, std)
