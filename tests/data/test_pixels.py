"""Image operations: each against torchvision, Pillow or the official code, image by image."""

import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastcl.data import pixels
from fastcl.data.operations import Solarize

B = 12


@pytest.fixture
def images():
    """Noise, and in it gray pixels, black, white and one-channel ones: where hue has no value."""
    images = torch.rand(B, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    images[0] = images[0].mean(0)
    images[1, :, :4] = 0
    images[2, :, :4] = 1
    images[3, 1:] = 0
    return images


def parameters(low, high):
    return torch.linspace(low, high, B)


def one_by_one(function, images, values):
    return torch.stack([function(image, float(v)) for image, v in zip(images, values)])


@pytest.mark.parametrize(
    "ours, theirs, low, high",
    [
        (pixels.brightness, tv.adjust_brightness, 0, 2),
        (pixels.contrast, tv.adjust_contrast, 0, 2),
        (pixels.saturation, tv.adjust_saturation, 0, 2),
        (pixels.hue, tv.adjust_hue, -0.5, 0.5),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colour_matches_torchvision(images, ours, theirs, low, high):
    values = parameters(low, high)
    expected = one_by_one(theirs, images, values)
    torch.testing.assert_close(ours(images, values), expected, atol=2e-6, rtol=0)


def test_grayscale_matches_torchvision(images):
    expected = tv.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(pixels.grayscale(images), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "ours, key, value",
    [
        (pixels.add_brightness, "brightness_+0.3", 0.3),
        (pixels.contrast_by_channel, "contrast_1.3", 1.3),
        (pixels.saturation_hsv, "saturation_1.2", 1.2),
        (pixels.hue, "hue_+0.07", 0.07),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colour_matches_the_official_tensorflow_forms(golden, ours, key, value):
    data = golden("byol_aug_ops")
    image = data["image"].permute(2, 0, 1)[None]
    expected = data[key].permute(2, 0, 1)[None].clamp(0, 1)  # not clipped in the file
    torch.testing.assert_close(ours(image, torch.tensor([value])), expected, atol=2e-6, rtol=0)


def test_solarize_is_byols_and_pillows(golden):
    data = golden("byol_aug_ops")
    image = data["image"].permute(2, 0, 1)[None]
    expected = data["solarize"].permute(2, 0, 1)[None]
    torch.testing.assert_close(Solarize().batch(image, ()), expected, atol=1e-7, rtol=0)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    pillow = tv.solarize(levels, threshold=128)
    torch.testing.assert_close(Solarize().batch(levels / 255, ()), pillow / 255, atol=1e-6, rtol=0)


def test_saturation_hsv_stops_at_full_saturation(images):
    out = pixels.saturation_hsv(images, torch.full((B,), 1e6))
    coloured = images.amax(1) > images.amin(1)
    assert (out.amin(1)[coloured].abs() < 1e-6).all()  # S = 1: the smallest channel is 0
    torch.testing.assert_close(out.amax(1), images.amax(1))
    torch.testing.assert_close(out[0], images[0])  # gray stays gray


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [8, 24, 32, 47])
def test_crop_matches_torchvision(kernel, size):
    """Smaller than the crop, larger, and crops that touch the borders."""
    images = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0, 0, 32, 40], [3, 5, 9, 31], [31, 39, 1, 1], [10, 0, 22, 7]])
    top, left, h, w = boxes.unbind(1)
    how = {"kernel": kernel, "antialias": True}
    rows = pixels.crop_matrix(top, h, 32, size, **how)
    out = pixels.separable(images, rows, pixels.crop_matrix(left, w, 40, size, **how))
    mode = InterpolationMode(kernel)
    for image, box, ours in zip(images, boxes.tolist(), out):
        expected = tv.resized_crop(image, *box, [size, size], mode, antialias=True)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_crop_without_antialias_takes_four_taps():
    """TensorFlow's bicubic: the kernel stays 4 pixels wide, whatever the scale."""
    matrix = pixels.crop_matrix(
        torch.tensor([2]), torch.tensor([24]), 32, 6, kernel="bicubic", antialias=False
    )[0]
    assert ((matrix != 0).sum(1) == 4).all()
    keys = torch.tensor([-0.0625, 0.5625, 0.5625, -0.0625])  # a = −1/2, half way
    torch.testing.assert_close(matrix[1, 6:10], keys)  # centre 2 + 4 · 1.5 = 8, taps 6 … 9


@pytest.mark.parametrize("case", "abcd")
def test_gaussian_blur_matches_simclr(golden, case):
    data = golden("simclr_gaussian_blur")
    image = data[f"{case}_img"].permute(2, 0, 1)[None]
    sigma = data[f"{case}_sigma"].float().view(1)
    radius = int(data[f"{case}_kernel_size"]) // 2
    matrix = pixels.gaussian_matrix(sigma, radius, image.shape[-1])
    out = pixels.separable(image, matrix, matrix)[0].permute(1, 2, 0)
    torch.testing.assert_close(out.double(), data[f"{case}_f64_out"], atol=1e-6, rtol=0)


def test_gaussian_blur_takes_each_image_its_own_sigma():
    sigma = torch.tensor([0.1, 0.7, 2.0])
    whole = pixels.gaussian_matrix(sigma, 3, 20)
    for i in range(3):
        torch.testing.assert_close(whole[i], pixels.gaussian_matrix(sigma[i : i + 1], 3, 20)[0])


def test_pillow_blur_matches_pillow():
    """Within the six roundings to 8 bits that Pillow makes, one a pass, and without a bias."""
    image = torch.randint(0, 256, (3, 25, 25), generator=torch.Generator().manual_seed(2))
    image = image.to(torch.uint8)
    sigma = torch.tensor([0.1, 0.4, 0.81, 1.3, 2.0, 3.5])
    matrix = pixels.pillow_blur_matrix(sigma, 25)
    out = pixels.separable((image / 255).expand(len(sigma), -1, -1, -1), matrix, matrix)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for value, ours in zip(sigma.tolist(), out):
        blurred = tv.pil_to_tensor(picture.filter(ImageFilter.GaussianBlur(value)))
        difference = ours * 255 - blurred
        assert difference.abs().max() <= 6 * 0.5
        assert difference.mean().abs() < 0.05
