"""Encoders: features of the promised size, torchvision's own names, and clear errors."""

import pytest
import torch
import torchvision

from fastcl import models
from fastcl.models import vit_moco_v3
from fastcl.models.tiny import DropPath, sine_positions


@pytest.mark.parametrize("name", models.NAMES)
def test_features_have_feature_dim(name):
    size = 224 if name == "alexnet-bn" else 32
    if name not in ("tiny-resnet", "tiny-vit", "resnet18"):
        with torch.device("meta"):  # shapes only: the large ones take seconds to initialise
            model = models.build(name, image_size=size).eval()
            features = model(torch.empty(2, 3, size, size))
    else:
        model = models.build(name, image_size=size).eval()
        features = model(torch.rand(2, 3, size, size))
        assert features.isfinite().all()
        assert (features[0] - features[1]).abs().max() > 0  # two images, two features
    assert features.shape == (2, model.feature_dim)


@pytest.mark.parametrize("name", models.TINY)
@pytest.mark.parametrize("size", [16, 20, 32, 48])
def test_tiny_defaults_take_crops_of_any_size(name, size):
    model = models.build(name, image_size=32)
    features = model(torch.rand(3, 3, size, size))
    features.square().sum().backward()
    assert features.shape == (3, model.feature_dim)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_torchvision_keys_and_features_are_torchvisions():
    ours = models.build("resnet18", image_size=224).eval()
    theirs = torchvision.models.resnet18().eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys
    theirs.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 96, 96)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("size, side", [(32, 32), (64, 64), (65, 16)])
def test_small_images_keep_their_resolution_at_the_stem(size, side):
    model = models.build("resnet18", image_size=size)
    seen = []
    model.layer1.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[-1]))
    model(torch.rand(2, 3, size, size))
    assert seen == [side + (size == 65)]  # 65 -> 33 -> 17


@pytest.mark.parametrize("name", ["tiny-resnet", "resnet18"])
def test_zero_init_residual_zeroes_the_last_norm_of_each_block(name):
    zero = models.build(name, image_size=32, zero_init_residual=True)
    norms = [m.weight for m in zero.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    blocks = {"tiny-resnet": 3, "resnet18": 8}[name]
    assert sum(not weight.any() for weight in norms) == blocks
    plain = models.build(name, image_size=32)
    assert all(m.weight.all() for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["tiny-resnet", "tiny-vit", "resnet18", "timm/resnet10t"])
def test_in_channels(name):
    model = models.build(name, image_size=64, in_channels=2).eval()
    assert model(torch.rand(1, 2, 64, 64)).shape == (1, model.feature_dim)


def test_timm_transformer_takes_the_image_size():
    model = models.build("timm/vit_tiny_patch16_224", image_size=48).eval()
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, model.feature_dim) == (2, 192)


def test_positions_match_moco_v3(golden):
    table = golden("mocov3_posembed_4x4_d96")["pos_embed_f64"][0, 1:]  # without the class token
    torch.testing.assert_close(sine_positions(4, 4, 96).double(), table, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name, grid, dim", [("4x4_d96", 4, 96), ("7x7_d192", 7, 192)])
def test_moco_v3s_transformer_starts_as_the_official_one(golden, name, grid, dim, monkeypatch):
    data = golden(f"mocov3_posembed_{name}")
    monkeypatch.setitem(vit_moco_v3.SIZES, "small", (dim, 1, 3))
    vit = vit_moco_v3.build("small", image_size=16 * grid)
    torch.testing.assert_close(vit.pos_embed.double(), data["pos_embed_f64"], rtol=0, atol=3e-7)
    assert not vit.pos_embed.requires_grad
    for weight, key in (
        (vit.patch_embed.proj.weight, "patch_w_bound"),
        (vit.blocks[0].attn.qkv.weight, "qkv_bound"),
    ):
        bound = float(data[key])
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not vit.patch_embed.proj.bias.any() and not vit.blocks[0].attn.qkv.bias.any()
    assert 0 < vit.cls_token.abs().max() < 1e-5
    assert vit.norm.eps == 1e-6 and vit.feature_dim == dim
    vit.norm.register_forward_hook(lambda _, x, y: tokens.append(y))
    tokens = []
    features = vit(torch.rand(2, 3, 16 * grid, 16 * grid))
    assert torch.equal(features, tokens[0][:, 0])  # the class token


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet5'.*tiny-resnet.*resnet50"):
        models.build("resnet5", image_size=32)
    with pytest.raises(ValueError, match=r"unknown backbone 'timm/vit_tinyy'.*vit_"):
        models.build("timm/vit_tinyy", image_size=32)
    with pytest.raises(ValueError, match="zero_init_residual is for ResNets"):
        models.build("tiny-vit", image_size=32, zero_init_residual=True)


@pytest.mark.parametrize("name, features", [("resnet18", 256), ("tiny-resnet", 64)])
def test_width_halves_the_stages(name, features):
    halved = models.build(name, image_size=32, width=0.5, zero_init_residual=True)
    assert halved.feature_dim == features
    assert halved(torch.randn(2, 3, 32, 32)).shape == (2, features)
    last = [m for n, m in halved.named_modules() if n.endswith("bn2")]
    assert last and all(norm.weight.abs().max() == 0 for norm in last)
    with pytest.raises(ValueError, match="width is for ResNets"):
        models.build("tiny-vit", image_size=32, width=0.5)


def test_drop_path_leaves_out_branches_image_by_image():
    torch.manual_seed(0)
    path = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = path(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(x))  # an image as a whole
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 4 / 3))
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(path.eval()(x), x)
    with pytest.raises(ValueError, match="drop_path is for transformers"):
        models.build("resnet18", image_size=32, drop_path=0.1)
