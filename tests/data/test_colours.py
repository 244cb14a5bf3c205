"""Colour spaces: what white, grey and pure colours are in them, and what a normalised view is."""

import pytest
import torch

from fastcl.data import augment
from fastcl.data.colours import convert, is_grey, rgb_to_lab, rgb_to_ycbcr

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixel(*rgb):
    return torch.tensor(rgb).double().view(1, 3, 1, 1)


@pytest.mark.parametrize(
    "rgb, lab",
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),  # the usual table of sRGB's primaries
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.01, 0.01, 0.01), (0.70, 0, 0)),  # on the straight part of both curves
    ],
)
def test_lab_of_known_colours(rgb, lab):
    torch.testing.assert_close(
        rgb_to_lab(pixel(*rgb)).flatten(), torch.tensor(lab).double(), rtol=0, atol=0.02
    )


def test_ycbcr_of_known_colours():
    for rgb, ycbcr in (((1, 1, 1), (235, 128, 128)), ((0, 0, 0), (16, 128, 128))):
        torch.testing.assert_close(
            rgb_to_ycbcr(pixel(*rgb)).flatten(), torch.tensor(ycbcr).double(), rtol=0, atol=1e-3
        )


def test_grey_is_normalised_like_the_rgb_it_comes_from():
    same = tuple([0.3] * 3), tuple([0.2] * 3)
    images = torch.rand(4, 1, 5, 6).expand(-1, 3, -1, -1)
    grey, rgb = (convert(images, colours, *same) for colours in ("grey", "rgb"))
    assert grey.shape == (4, 1, 5, 6)
    torch.testing.assert_close(grey, rgb[:, :1], rtol=0, atol=1e-3)  # lumas add up to 0.9999
    torch.testing.assert_close(
        convert(images, "grey", None, None), images[:, :1], rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("colours, channels", [("grey", 1), ("lab", 3), ("ycbcr", 3), ("rgb", 3)])
def test_views_and_test_images_are_in_the_same_space(colours, channels):
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    options = {"image_size": 16, "mean": MEAN, "std": STD, "colours": colours}
    crops = [augment.Crops(1, 16, (1.0, 1.0))]
    recipe = augment.build("cpc", crops=crops, **options)
    generator = torch.Generator().manual_seed(0)
    (view,) = recipe.views(images, generator)
    seen = recipe.normalize(images)
    assert view.shape == seen.shape == (5, channels, 16, 16)
    for a, b in zip(view, seen):  # the whole image, flipped or not
        assert torch.allclose(a, b, atol=1e-4) or torch.allclose(a, b.flip(-1), atol=1e-4)


def test_grey_images_are_told_from_coloured_ones():
    grey = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8).repeat(1, 3, 1, 1)
    assert is_grey(grey) and is_grey(grey[:, :1])
    grey[2, 0, 1, 1] += 1
    assert not is_grey(grey)


@pytest.mark.parametrize("function", [rgb_to_lab, rgb_to_ycbcr])
def test_what_is_not_rgb_is_refused(function):
    with pytest.raises(ValueError, match=r"RGB images \(B, 3, H, W\); got \(2, 1, 4, 4\)"):
        function(torch.rand(2, 1, 4, 4))
