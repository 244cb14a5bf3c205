"""Exported encoders, loaded by the library that they were exported for: the same features."""

import importlib.util
import json

import pytest
import timm
import torch
import torchvision

from fastcl import checkpoint, export, models
from fastcl.config import Run, as_dict, with_values
from fastcl.methods import METHODS

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx needs onnx, onnxscript and onnxruntime: pip install 'fastcl[export]'",
)


def run_of(folder, method, recipe="paper", size=None, **changes):
    """A run folder with a checkpoint of an untrained encoder, and the encoder."""
    cls = METHODS[method]
    values = as_dict(Run(method=method), cls.recipes[recipe])
    values |= {"image_size": size} | changes
    config = with_values(cls.recipes["paper"], values)
    torch.manual_seed(0)
    encoder = cls.build_encoder(config, size or 32).eval()
    for module in encoder.modules():  # statistics as of some training, so that they count
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    weights = {f"{cls.kept}.{k}": v for k, v in encoder.state_dict().items()}
    checkpoint.save(folder / "checkpoint.pt", {"values": values, "method": weights})
    return encoder


def same(theirs, ours, size, channels=3):
    images = torch.randn(2, channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), ours(images), rtol=1e-4, atol=1e-5)


def test_torchvision_loads_its_resnets(tmp_path, capsys):
    ours = run_of(tmp_path, "moco-v2", size=96, backbone="resnet50")
    assert export.main([str(tmp_path), "--to", "torchvision"]) == 0
    line, file = capsys.readouterr().out.splitlines()
    assert file == str(tmp_path / "encoder-torchvision.pth")
    scope = {"torch": torch, "torchvision": torchvision}
    exec(line, scope)  # what it says is what works
    theirs = scope["model"]
    left = theirs.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys
    theirs.fc = torch.nn.Identity()
    same(theirs, ours, 96)


@pytest.mark.parametrize(
    "method, recipe, backbone, size",
    [
        ("simsiam", "paper", "resnet18", 96),
        ("moco-v3", "paper-vit", "vit-small-moco-v3", 32),
        ("dino", "paper", "vit-tiny-dino", 48),
        ("swav", "paper", "timm/vit_tiny_patch16_224", 32),
    ],
)
def test_timm_loads_what_it_has(tmp_path, capsys, method, recipe, backbone, size):
    ours = run_of(tmp_path, method, recipe, size, backbone=backbone)
    assert export.main([str(tmp_path), "--to", "timm"]) == 0
    line, _ = capsys.readouterr().out.splitlines()
    same(eval(line, {"timm": timm}), ours, size)


@pytest.mark.parametrize("method, size", [("cmc", 32), ("byol-v2", 32), ("dino", 24)])
def test_safetensors_holds_every_tensor(tmp_path, capsys, method, size):
    safetensors = pytest.importorskip("safetensors")
    ours = run_of(tmp_path, method, "quick", size)
    output = tmp_path / "any.safetensors"
    assert export.main([str(tmp_path), "--to", "safetensors", "--output", str(output)]) == 0
    line, _ = capsys.readouterr().out.splitlines()
    weights = eval(line, {"safetensors": importlib.import_module("safetensors.torch")} | {
        "safetensors": safetensors
    })  # fmt: skip
    assert list(weights) and weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in ours.state_dict().items())
    with safetensors.safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["values"])["method"] == method
    assert metadata["image_size"] == str(size)


@needs_onnx
@pytest.mark.parametrize(
    "method, recipe, size, colours",
    [("dino", "quick-vit", 24, 3), ("cpc", "quick", 32, 1)],  # of a transformer; of patches, grey
)
def test_onnx_runs_for_any_number_of_images(tmp_path, capsys, method, recipe, size, colours):
    import onnxruntime

    ours = run_of(tmp_path, method, recipe, size)
    assert export.main([str(tmp_path), "--to", "onnx"]) == 0
    line, _ = capsys.readouterr().out.splitlines()
    session = eval(line, {"onnxruntime": onnxruntime})
    for count in (1, 5):
        images = torch.randn(count, colours, size, size)
        features = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(features, ours(images), rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "encoder-onnx.onnx"]


def test_a_graph_that_computes_something_else_is_refused(tmp_path, capsys, monkeypatch):
    """What onnxruntime gives is compared before the file is kept."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Wrong:
        def __init__(self, *args, **options):
            pass

        def run(self, names, inputs):
            return [torch.zeros(3, 128).numpy()]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    monkeypatch.setattr(torch.onnx, "export", lambda encoder, args, file, **_: file.touch())
    run_of(tmp_path, "simclr-v1", "quick", 24)
    assert export.main([str(tmp_path), "--to", "onnx"]) == 2
    assert "off PyTorch's" in capsys.readouterr().err
    assert not (tmp_path / "encoder-onnx.onnx").exists()


@pytest.mark.parametrize(
    "method, recipe, changes, to, reason",
    [
        ("swav", "quick", {}, "torchvision", "this run's backbone is tiny-resnet"),
        ("swav", "quick", {}, "timm", "timm has no such encoder as tiny-resnet"),
        ("cmc", "quick", {}, "torchvision", "cmc's encoder is not one network"),
        ("moco-v1", "paper", {"backbone": "resnet18"}, "torchvision", "its stem is another"),
        ("moco-v1", "paper", {"backbone": "resnet18"}, "timm", "its stem is another"),
        (
            "dino",
            "paper",
            {"backbone": "vit-tiny-dino"},
            "torchvision",
            "torchvision's ResNets are",
        ),
        ("byol-v2", "paper", {"backbone": "resnet18"}, "timm", r"its norms are gn+ws"),
        (
            "simclr-v1",
            "paper",
            {"backbone": "resnet18", "colours": "grey"},
            "torchvision",
            "takes grey images",
        ),
    ],
)
def test_what_a_library_lacks_is_one_line(tmp_path, capsys, method, recipe, changes, to, reason):
    run_of(tmp_path, method, recipe, 32, **changes)
    assert export.main([str(tmp_path), "--to", to]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and reason in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_simclr_v2s_resnets_are_not_torchvisions():
    values = {"method": "simclr-v2", "backbone": "resnet50", "colours": "rgb"}
    with pytest.raises(ValueError, match="SimCLR v2's ResNets have names of their own"):
        export._plain(values, 224, "timm")


def test_a_missing_package_or_run_is_one_line(tmp_path, capsys, monkeypatch):
    run_of(tmp_path, "swav", "quick", 24)
    for to, package in (("safetensors", "safetensors.torch"), ("onnx", "onnxruntime")):
        with monkeypatch.context() as patch:
            patch.setitem(importlib.import_module("sys").modules, package, None)
            assert export.main([str(tmp_path), "--to", to]) == 2
        assert "pip install 'fastcl[export]'" in capsys.readouterr().err
    assert export.main([str(tmp_path / "none"), "--to", "timm"]) == 2
    assert "fastcl.export: error:" in capsys.readouterr().err


def test_the_side_of_the_images_is_the_data_unless_given(tmp_path, capsys):
    ours = run_of(tmp_path, "swav", "quick", None)
    assert export.main([str(tmp_path), "--to", "safetensors"]) == 0
    assert "tiny-resnet, 32 pixels" in capsys.readouterr().out  # the embedded images'
    assert ours.feature_dim == models.build("tiny-resnet", image_size=32).feature_dim
    assert export.main([str(tmp_path), "--to", "safetensors", "--image-size", "48"]) == 0
    assert "48 pixels" in capsys.readouterr().out
