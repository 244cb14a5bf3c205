"""CMC against the official code: two steps on its two banks, and the colours of its views."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, normalize

from fastcl import train
from fastcl.data import augment
from fastcl.data.colours import rgb_to_lab, rgb_to_ycbcr
from fastcl.methods import METHODS
from fastcl.methods.base import Progress
from fastcl.methods.cmc import CMC, Config, Views

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def at(y):
    return Progress(step=0, steps_per_epoch=10, epochs=1, indices=torch.as_tensor(y))


def bare(no_encoder, size, dims, **changes):
    """CMC without networks: its image is the features of all views, side by side."""
    encoder = Views([no_encoder(dim) for dim in dims], dims)
    config = {"channels": tuple(dims), "dim": dims[0]} | changes
    method = CMC(encoder, Config(**config))
    method.heads = torch.nn.ModuleList([torch.nn.Identity() for _ in dims])
    method.set_images(size)
    return method


def tangent(gradient, x):
    """A gradient on the sphere, through the normalisation of rows x that are unit already."""
    gradient = torch.tensor(gradient)
    return (gradient - (gradient * x).sum(1, keepdim=True) * x).numpy()


@DTYPES
@pytest.mark.parametrize("name", ["cmc_nce_b8_d128_n100_k48", "cmc_softmax_b8_d128_n100_k48"])
def test_two_steps_follow_the_official_code(golden, no_encoder, name, dtype, monkeypatch):
    data = golden(name)
    size, dim = data["mem_l_before"].shape
    loss = "softmax" if int(data["param_softmax"]) else "nce"
    momentum, temperature = float(data["param_momentum"]), float(data["param_T"])
    options = {"loss": loss, "momentum": momentum, "temperature": temperature, "negatives": 48}
    method = bare(no_encoder, size, (dim, dim), **options).to(dtype)
    for bank, view in zip(method.banks, ("l", "ab")):
        bank.features.copy_(torch.tensor(data[f"mem_{view}_before"]))
    rtol = 1e-6 if dtype == torch.float64 else 5e-6  # the views are unit to float32 only
    for step in ("s1_", "s2_"):
        views = [torch.tensor(data[step + view], dtype=dtype) for view in ("l", "ab")]
        image = torch.cat(views, 1).requires_grad_(True)
        y, index = data[f"{step}y"], torch.tensor(data[f"{step}idx"]).long()
        monkeypatch.setattr(method, "candidates", lambda y, index=index: index)
        value = method.loss([image], at(y))
        value.backward()
        method.after_backward(at(y))
        np.testing.assert_allclose(value.item(), data[f"{step}f64_loss"], rtol=rtol)
        gradients = image.grad.split(dim, 1)
        for i, view in enumerate(("l", "ab")):
            truth = tangent(data[f"{step}f64_grad_{view}"], views[i])
            slack = 5 * rtol * np.abs(truth).max()
            np.testing.assert_allclose(gradients[i], truth, rtol=0, atol=slack)
            rows = method.banks[i].features[torch.tensor(y)]
            truth = data[f"{step}f64_mem_{view}_rows_after"]
            np.testing.assert_allclose(rows, truth, rtol=0, atol=1e-6)
            if loss == "nce":
                assert method.pairs[i] == ((0, 1), (1, 0))[i]
                truth = data[f"{step}f64_Z_{view}"]
                np.testing.assert_allclose(method.partitions[i].z.item(), truth, rtol=rtol)


def test_lab_and_ycbcr_are_those_of_the_official_pipeline(golden):
    data = golden("cmc_lab_ycbcr")
    rgb = torch.tensor(data["rgb"]).permute(2, 0, 1)[None]
    for name, function in (("lab", rgb_to_lab), ("ycbcr", rgb_to_ycbcr)):
        exact = function(rgb.double() / 255)[0].permute(1, 2, 0)
        np.testing.assert_allclose(exact, data[f"f64_{name}"], rtol=0, atol=1e-9)
        recipe = augment.build("cmc", image_size=13, mean=(0.5,) * 3, std=(0.5,) * 3, colours=name)
        normal = recipe.normalize(rgb)[0]
        assert normal.dtype == torch.float32
        np.testing.assert_allclose(normal, data[f"{name}_norm_chw"], rtol=0, atol=2e-6)


def test_all_images_as_candidates_is_the_cross_entropy_over_the_other_bank(no_encoder):
    torch.manual_seed(0)
    options = {"loss": "softmax", "negatives": 0, "temperature": 0.2}
    method = bare(no_encoder, 30, (5, 5), **options).double()
    image, y = torch.randn(6, 10).double(), torch.tensor([3, 0, 29, 7, 7, 21])
    views = [normalize(view, dim=1) for view in image.split(5, 1)]
    l, ab = (bank.features for bank in method.banks)
    expected = cross_entropy(views[0] @ ab.T / 0.2, y) + cross_entropy(views[1] @ l.T / 0.2, y)
    torch.testing.assert_close(method.loss([image], at(y)), expected)
    assert method.collapsed_loss() == pytest.approx(2 * math.log(30))


def test_three_views_are_compared_in_a_full_graph_or_around_the_first(no_encoder):
    torch.manual_seed(0)
    options = {"loss": "softmax", "negatives": 0, "temperature": 0.2}
    full = bare(no_encoder, 30, (4, 4, 4), **options).double()
    core = bare(no_encoder, 30, (4, 4, 4), graph="core", **options).double()
    for mine, theirs in zip(core.banks, full.banks):
        mine.features.copy_(theirs.features)
    image, y = torch.randn(6, 12).double(), torch.arange(6)
    x = [normalize(view, dim=1) for view in image.split(4, 1)]

    def term(i, j):
        return cross_entropy(x[i] @ full.banks[j].features.T / 0.2, y)

    around = term(0, 1) + term(1, 0) + term(0, 2) + term(2, 0)
    torch.testing.assert_close(core.loss([image], at(y)), around)
    torch.testing.assert_close(full.loss([image], at(y)), around + term(1, 2) + term(2, 1))


def test_partition_stays_or_averages_and_is_saved(no_encoder):
    scores = torch.full((2, 4), math.log(2.0)).double(), torch.full((2, 4), math.log(4.0)).double()
    for z_momentum, expected in ((0.0, [80, 80]), (0.75, [80, 100])):
        method = bare(no_encoder, 40, (5, 5), z_momentum=z_momentum).double()
        assert [method.partitions[0](s, 40).item() for s in scores] == pytest.approx(expected)
        state = method.state_dict()
        assert state["partitions.0.z"].item() == pytest.approx(expected[-1])
        assert state["partitions.1.z"].item() == 0 and not state["partitions.0.z"].requires_grad


def test_encoders_see_only_their_own_channels():
    torch.manual_seed(0)
    config = Config(backbone="tiny-resnet", width=0.5)
    encoder = CMC.build_encoder(config, 16).eval()
    images = torch.randn(3, 3, 16, 16)
    changed = images.clone()
    changed[:, 1:] += 1
    before, after = encoder(images), encoder(changed)
    assert before.shape == (3, 128) and encoder.feature_dim == 128  # two of half the width
    assert torch.equal(before[:, :64], after[:, :64])
    assert not torch.allclose(before[:, 64:], after[:, 64:])


@pytest.mark.parametrize("width, features, middle", [(0.5, 1024, 32), (1.0, 2048, 64)])
def test_halves_of_a_resnet50_have_the_official_widths(width, features, middle):
    config = Config(backbone="resnet50", width=width)
    lightness, colours = CMC.build_encoder(config, 224).encoders
    assert (lightness.conv1.weight.shape, colours.conv1.weight.shape) == (
        (64, 1, 7, 7),
        (64, 2, 7, 7),
    )
    assert lightness.layer1[0].conv1.weight.shape == (middle, 64, 1, 1)
    assert lightness.feature_dim == features


def test_halves_of_an_alexnet_have_the_official_widths():
    with torch.device("meta"):
        encoder = CMC.build_encoder(Config(backbone="alexnet-bn", width=0.5), 224)
        for channels, half in zip((1, 2), encoder.encoders):
            layers = list(half.layers)
            widths = [
                m.weight.shape[0] for m in layers if hasattr(m, "weight") and m.weight.ndim > 1
            ]
            assert widths == [48, 128, 192, 192, 128, 2048, 2048]
            assert half(torch.empty(2, channels, 224, 224)).shape == (2, 2048)
    with pytest.raises(ValueError, match="alexnet-bn takes images of 224 pixels; got 64"):
        CMC.build_encoder(Config(backbone="alexnet-bn"), 64)


def test_grey_images_are_refused_with_a_reason(no_encoder):
    method = bare(no_encoder, 4, (1, 2))
    grey = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    for images in (grey, grey.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match="these images are grey"):
            method.look(images)
    colour = grey.repeat(1, 3, 1, 1)
    colour[3, 1, 2, 2] += 1
    method.look(colour)
    with pytest.raises(ValueError, match=r"cmc needs images of 3 channels; got \(5, 1, 8, 8\)"):
        method.loss([grey.float()], at([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match="made of RGB images"):
        rgb_to_lab(grey.float())


def test_training_on_grey_images_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "cmc", CMC)
    for split in ("train", "test"):
        folder = tmp_path / "data" / split / "only"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("L", (16, 16), 60 * i).save(folder / f"{i}.png")
    flags = f"--data folder --data-dir {tmp_path / 'data'} --batch-size 2 --epochs 1 --workers 0"
    arguments = f"--method cmc {flags} --output {tmp_path / 'run'}"
    assert train.main(arguments.split()) == 2
    line = capsys.readouterr().err
    assert "these images are grey" in line and line.count("\n") == 1


def test_choices_that_do_not_exist_are_refused(no_encoder):
    encoder = Views([no_encoder(5), no_encoder(5)], (5, 5))
    for changes, message in (
        ({"loss": "ce"}, "loss must be nce or softmax; got 'ce'"),
        ({"graph": "star"}, "graph must be full or core; got 'star'"),
        ({"negatives": 0}, "nce loss needs negatives"),
        ({"channels": (3,)}, "two groups or more"),
    ):
        with pytest.raises(ValueError, match=message):
            CMC(encoder, Config(**changes))
    with pytest.raises(ValueError, match="channels must be 3 in all for lab"):
        CMC.build_encoder(Config(channels=(1, 1)), 16)


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "width": 0.5, "epochs": 240, "batch_size": 128, "optimizer": "sgd",
        "lr": 0.03, "sgd_momentum": 0.9, "weight_decay": 1e-4, "schedule": "step",
        "milestones": (120, 160, 200), "dim": 128, "loss": "nce", "negatives": 4096,
        "temperature": 0.07, "momentum": 0.5, "z_momentum": 0.0, "augmentation": "cmc",
        "colours": "lab", "jitter": 0.0, "channels": (1, 2), "crop_scale": (0.08, 1.0),
    }  # fmt: skip
    assert dataclasses.asdict(CMC.recipes["paper"]).items() >= expected.items()
