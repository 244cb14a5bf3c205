"""Recipes: the batched views equal the image-by-image ones, and the draws have the right laws."""

import math

import pytest
import torch

from fastcl.data import augment
from fastcl.data.augment import Crops
from fastcl.data.operations import (
    Blur,
    BlurPillow,
    Crop,
    CropBYOL,
    CropSquare,
    CropTensorFlow,
    Flip,
    Grayscale,
    Jitter,
    JitterTensorFlow,
    Solarize,
    Sometimes,
    as_float,
    select,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OPERATIONS = [
    Crop(24, (0.1, 1.0)),
    Crop(20, (0.1, 1.0), kernel="bicubic"),
    CropTensorFlow(24, (0.08, 1.0)),
    CropBYOL(24, (0.08, 1.0)),
    CropSquare(24, (0.3, 1.0)),
    Solarize(),
    Flip(),
    Grayscale(),
    Jitter(0.8, 0.8, 0.8, 0.2),
    JitterTensorFlow(0.8, 0.8, 0.8, 0.2),
    JitterTensorFlow(0.8, 0.8, 0.8, 0.2, additive=True),
    Blur(),
    BlurPillow(),
    Sometimes(0.5, Jitter(0.4, 0.4, 0.4, 0.4)),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    """Smooth images, as photographs are: noise would make Pillow's rounding the whole signal."""
    noise = torch.rand(40, 3, 6, 7, generator=generator(1))
    smooth = torch.nn.functional.interpolate(noise, (32, 36), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__)
def test_batch_equals_image_by_image(images, operation):
    drawn = operation.draw(len(images), 32, 36, generator())
    batch = operation.batch(as_float(images), drawn)
    single = [operation.single(as_float(x), select(drawn, i)) for i, x in enumerate(images)]
    slack = 3.5 / 255 if isinstance(operation, BlurPillow) else 3e-5  # Pillow rounds to 8 bits
    torch.testing.assert_close(batch, torch.stack(single), atol=slack, rtol=0)
    assert batch.min() >= 0 and batch.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", augment.RECIPES)
def test_views_are_the_list_applied_in_order(images, name):
    """Against a loop over images and operations with the same draws."""
    recipe = augment.build(name, image_size=28, mean=MEAN, std=STD)
    views = recipe.views(images, generator())
    twin = generator()
    for operations, view in zip(recipe.lists, views):
        assert view.dtype == torch.float32 and view.shape == (40, 3, *[operations[0].size] * 2)
        size, drawn = (32, 36), []
        for operation in operations:
            drawn.append(operation.draw(40, *size, twin))
            size = view.shape[-2:]
        for i in range(0, 40, 7):
            x = images[i]
            for operation, parameters in zip(operations, drawn):
                x = operation.single(x, select(parameters, i))
            expected = recipe.normalize(x[None])[0]
            # Pillow's seven roundings, over std; without its blur only those of float32.
            slack = 3.5 / 255 / min(STD) if "BlurPillow" in names(operations) else 1e-4
            torch.testing.assert_close(view[i], expected, atol=slack, rtol=0)


@pytest.mark.parametrize("name", augment.RECIPES)
def test_views_depend_on_the_generator_alone(images, name):
    recipe = augment.build(name, image_size=32, mean=MEAN, std=STD)
    first, again = recipe.views(images, generator(3)), recipe.views(images, generator(3))
    torch.rand(7)  # the global generator plays no part
    other = recipe.views(images, generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not torch.equal(first[0], first[1])


def test_chunks_do_not_show(images, monkeypatch):
    recipe = augment.build("moco-v2", image_size=32, mean=MEAN, std=STD)
    whole = recipe.views(images, generator())
    monkeypatch.setattr(augment, "CHUNK", 11)
    for a, b in zip(whole, recipe.views(images, generator())):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(32, 48), (600, 40), (50, 700)])
def test_views_of_one_large_image(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator())
    recipe = augment.build("swav", image_size=64, mean=MEAN, std=STD)
    shapes = [tuple(view.shape) for view in recipe.views_of(image, generator())]
    assert shapes == [(3, 64, 64)] * 2 + [(3, 27, 27)] * 6


@pytest.mark.parametrize("height, width", [(32, 32), (100, 60)])
def test_crop_draws_torchvisions_law(height, width):
    """Against torchvision's own draws: the same area and ratio quantiles, crops inside."""
    from torchvision.transforms.v2 import RandomResizedCrop

    ours = torch.stack(Crop(32, (0.2, 1.0)).draw(4000, height, width, generator()), 1)
    torch.manual_seed(0)
    theirs = RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.empty(3, height, width)
    boxes = [theirs.make_params([image]) for _ in range(2000)]
    boxes = torch.tensor([[b["top"], b["left"], b["height"], b["width"]] for b in boxes])
    quantiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    for measure in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: (b[:, 0] + b[:, 2] / 2) / height,
        lambda b: (b[:, 1] + b[:, 3] / 2) / width,
    ):
        a, b = (measure(x.double()).float().quantile(quantiles) for x in (ours, boxes))
        torch.testing.assert_close(a, b, atol=0.04, rtol=0)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_crop_falls_back_to_the_central_one():
    top, left, h, w = Crop(32, (1.0, 1.0)).draw(5, 10, 100, generator())  # never fits
    assert (top == 0).all() and (h == 10).all() and (w == 13).all() and (left == 43).all()


@pytest.mark.parametrize("height, width", [(32, 32), (50, 200), (200, 50), (3, 3)])
def test_tensorflow_crop_keeps_to_its_bounds(height, width):
    top, left, h, w = CropTensorFlow(32, (0.08, 0.8)).draw(5000, height, width, generator())
    whole = (h == height) & (w == width)  # where no attempt fitted
    area = h * w / (height * width)
    assert ((area >= 0.1 - 1e-6) & (area <= 0.8 + 1e-6) | whole).all()
    assert (top >= 0).all() and (top + h <= height).all()
    assert (left >= 0).all() and (left + w <= width).all()
    if height == width == 32:
        assert not whole.any()
        # round(h · ratio) with ratio in [3/4, 4/3]
        assert ((w / h - 1 >= -0.25 - 0.5 / h) & (w / h - 4 / 3 <= 0.5 / h)).all()
        # uniform in the height for a given ratio, so the side and not the area is spread evenly
        side = (h * w).double().sqrt()
        assert abs(side.mean() - 32 * (math.sqrt(0.1) + math.sqrt(0.8)) / 2) < 0.5


def test_jitter_draws_cover_their_ranges_in_every_order():
    order, amounts = Jitter(0.4, 0.8, 1.2, 0.1).draw(4000, 8, 8, generator())
    expected = torch.tensor([[0.6, 1.4], [0.2, 1.8], [0.0, 2.2], [-0.1, 0.1]])
    torch.testing.assert_close(amounts.amin(0), expected[:, 0], atol=0.01, rtol=0)
    torch.testing.assert_close(amounts.amax(0), expected[:, 1], atol=0.01, rtol=0)
    assert len(order.unique(dim=0)) == 24
    _, additive = JitterTensorFlow(0.8, 0, 0, 0, additive=True).draw(4000, 8, 8, generator())
    assert -0.8 <= additive[:, 0].min() < -0.79 and 0.79 < additive[:, 0].max() <= 0.8


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_sometimes_has_its_probability(probability):
    images = torch.rand(2000, 3, 4, 4, generator=generator())
    operation = Sometimes(probability, Flip())
    out = operation.batch(images, operation.draw(2000, 4, 4, generator(1)))
    flipped = (out == images.flip(-1)).all((1, 2, 3))
    assert ((out == images).all((1, 2, 3)) | flipped).all()
    assert abs(flipped.float().mean() - probability) < 0.04


def names(operations):
    inner = [o.operation if isinstance(o, Sometimes) else o for o in operations]
    return [type(o).__name__ for o in inner]


@pytest.mark.parametrize(
    "name, expected, probabilities",
    [
        ("instdisc", ["Crop", "Grayscale", "Jitter", "Flip"], [0.2, 0.5]),
        ("moco-v1", ["Crop", "Grayscale", "Jitter", "Flip"], [0.2, 0.5]),
        ("invaspread", ["Crop", "Jitter", "Grayscale", "Flip"], [0.2, 0.5]),
        ("moco-v2", ["Crop", "Jitter", "Grayscale", "BlurPillow", "Flip"], [0.8, 0.2, 0.5, 0.5]),
        ("swav", ["Crop", "Flip", "Jitter", "Grayscale", "BlurPillow"], [0.5, 0.8, 0.2, 0.5]),
        (
            "simclr-v1",
            ["CropTensorFlow", "Flip", "JitterTensorFlow", "Grayscale", "Blur"],
            [0.5, 0.8, 0.2, 0.5],
        ),
    ],
)
def test_lists_are_the_papers(name, expected, probabilities):
    recipe = augment.build(name, image_size=224, mean=MEAN, std=STD)
    for operations in recipe.lists:
        assert names(operations) == expected
        assert [o.probability for o in operations if isinstance(o, Sometimes)] == probabilities
    without = augment.build(name, image_size=224, mean=MEAN, std=STD, blur=False)
    assert names(without.lists[0]) == [n for n in expected if not n.startswith("Blur")]


@pytest.mark.parametrize(
    "name, first, second, probabilities",
    [
        (
            "byol",
            ["CropBYOL", "Flip", "JitterTensorFlow", "Grayscale", "Blur"],
            ["CropBYOL", "Flip", "JitterTensorFlow", "Grayscale", "Blur", "Solarize"],
            ([0.5, 0.8, 0.2, 1.0], [0.5, 0.8, 0.2, 0.1, 0.2]),
        ),
        (
            "moco-v3",
            ["Crop", "Jitter", "Grayscale", "BlurPillow", "Flip"],
            ["Crop", "Jitter", "Grayscale", "BlurPillow", "Solarize", "Flip"],
            ([0.8, 0.2, 1.0, 0.5], [0.8, 0.2, 0.1, 0.2, 0.5]),
        ),
    ],
)
def test_views_of_byol_and_moco_v3_differ(name, first, second, probabilities):
    recipe = augment.build(name, image_size=224, mean=MEAN, std=STD)
    assert [names(operations) for operations in recipe.lists] == [first, second]
    for operations, expected in zip(recipe.lists, probabilities, strict=True):
        assert [o.probability for o in operations if isinstance(o, Sometimes)] == expected
        jitter = operations[names(operations).index(first[2 if name == "byol" else 1])].operation
        assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
        assert (jitter.saturation, jitter.hue) == (0.2, 0.1)
    without = augment.build(name, image_size=224, mean=MEAN, std=STD, blur=False)
    for operations, expected in zip(without.lists, (first, second), strict=True):
        assert names(operations) == [n for n in expected if not n.startswith("Blur")]


def test_byols_crop_is_cut_to_the_image():
    """One attempt: a side that would be longer than the image's is the image's."""
    wide = CropBYOL(32, (1.0, 1.0)).draw(4000, 20, 60, generator())
    top, left, h, w = wide
    assert ((top >= 0) & (top + h <= 20) & (left >= 0) & (left + w <= 60)).all()
    assert (h == 20).all()  # √(1200 · 3/4) = 30 already
    assert w.min() == 30 and w.max() == 40  # √(1200 · 3/4) to √(1200 · 4/3)
    ratio = (w / (1200 / w)).log()
    spread = 2 * math.log(4 / 3)
    assert abs(ratio.mean()) < 0.02 and abs(ratio.std() - spread / 12**0.5) < 0.02


def test_multi_crop_is_swavs():
    recipe = augment.build("swav", image_size=224, mean=MEAN, std=STD)
    crops = [(ops[0].size, ops[0].scale) for ops in recipe.lists]
    assert crops == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    crops = [Crops(2, 32, (0.3, 1.0)), Crops(3, 16, (0.1, 0.3))]
    other = augment.build("moco-v2", image_size=32, mean=MEAN, std=STD, crops=crops)
    assert [ops[0].size for ops in other.lists] == [32, 32, 16, 16, 16]


def test_strength_scales_the_jitter():
    recipe = augment.build("swav", image_size=32, mean=MEAN, std=STD, strength=0.5)
    assert recipe.lists[0][2].operation == Jitter(0.4, 0.4, 0.4, 0.1)


def test_normalisation():
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    build = lambda name, std: augment.build(name, image_size=4, mean=MEAN, std=std)  # noqa: E731
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(build("moco-v2", STD).normalize(images)[1, :, 0, 0], expected)
    assert build("simclr-v1", STD).normalize(images).eq(1).all()  # SimCLR: none
    imagenet = (0.229, 0.224, 0.225)
    assert build("swav", imagenet).std == (0.228, 0.224, 0.225)  # as SwAV's code has it
    assert build("moco-v2", imagenet).std == imagenet


def test_unknown_name_is_listed():
    with pytest.raises(ValueError, match=r"unknown augmentation 'mocov2'.*instdisc.*moco-v2"):
        augment.build("mocov2", image_size=32, mean=MEAN, std=STD)


def test_square_crop_is_a_window_of_the_squeezed_image():
    share = (256 / 300) ** 2
    top, left, height, width = CropSquare(256, (share, share)).draw(500, 300, 600, generator())
    assert set(height.tolist()) == {256} and set(width.tolist()) == {512}
    assert (top.min(), top.max()) == (0, 44) and left.min() == 0 and left.max() >= 86


def test_cmc_leaves_colours_alone_at_strength_0():
    lists = [
        augment.build("cmc", image_size=32, mean=MEAN, std=STD, strength=s).lists[0]
        for s in (0.0, 1.0)
    ]
    assert [names(operations) for operations in lists] == [
        ["Crop", "Flip"],
        ["Crop", "Jitter", "Flip"],
    ]


def test_dinos_views_differ_in_blur_and_solarization():
    crops = [Crops(2, 32, (0.4, 1.0)), Crops(3, 16, (0.05, 0.4))]
    recipe = augment.build("dino", image_size=32, mean=MEAN, std=STD, crops=crops)
    first, second, *small = recipe.lists
    start = ["Crop", "Flip", "Jitter", "Grayscale", "BlurPillow"]
    assert names(first) == start and names(second) == [*start, "Solarize"]
    assert [names(operations) for operations in small] == [start] * 3
    blur = [operations[4].probability for operations in recipe.lists]
    assert blur == [1.0, 0.1, 0.5, 0.5, 0.5] and second[5].probability == 0.2
    assert first[0].kernel == "bicubic"
