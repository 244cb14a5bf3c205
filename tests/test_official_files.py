"""Official checkpoints that lack something, are of another kind or hold code; a run folder."""

import pytest
import torch
import torchvision

from fastcl import checkpoint, evaluate
from fastcl.data import DataSplits, TensorSplit
from fastcl.official import __main__ as command
from fastcl.official import load_official


@pytest.fixture(scope="module")
def small():
    """What a MoCo v1 of ResNet-18 has of its query encoder."""
    query = torchvision.models.resnet18(num_classes=128)
    return {f"module.encoder_q.{k}": v for k, v in query.state_dict().items()}


def test_a_momentum_copy_that_is_absent_is_copied(small):
    ours, absent = load_official(small, "moco-v1")
    assert absent == ["key_encoder", "queue"]
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        truth = ours.head(ours.eval().encoder(images))
        torch.testing.assert_close(ours.key_encoder(images), truth)


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("simclr-v1", {}, "no released files are known of 'simclr-v1'; of moco-v1, .*dino"),
        ("swav", {}, "no checkpoint of swav: its names are those of moco-v1"),
        ("moco-v2", {}, r"2 tensors of this file have no place in moco-v2: head\.weight"),
        (
            "moco-v1",
            {"module.encoder_q.layer1.0.conv1.weight": None},
            r"encoder of this file is none that moco-v1 is loaded into \(resnet18, resnet34, "
            r"resnet50, .*nearest is resnet18: the file has no layer1\.0\.conv1\.weight",
        ),
        (
            "moco-v1",
            {"module.encoder_q.conv1.weight": torch.zeros(32, 3, 7, 7)},
            r"resnet18: conv1\.weight is \(32, 3, 7, 7\) in the file and \(64, 3, 7, 7\) there",
        ),
        (
            "moco-v1",
            {"module.encoder_q.classifier.weight": torch.zeros(10, 512)},
            r"nearest is resnet18: the file has classifier\.weight \(10, 512\) too",
        ),
        ("moco-v1", {"module.encoder_q.fc.bias": None}, "lacks 1 tensors of .* head: head.bias"),
        (
            "moco-v1",
            {"module.extra": torch.zeros(1)},
            "1 tensors of this file have no place in moco-v1: extra",
        ),
        ("moco-v1", {"module.queue": torch.zeros(64, 9)}, "queue.features has the shape"),
    ],
)
def test_what_does_not_fit_is_named(small, method, change, message):
    state = {k: v for k, v in (small | change).items() if v is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_official(state, method)
    assert "\n" not in str(caught.value)


class Surprise:
    pass


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.pth").write_text("not found")
    with pytest.raises(ValueError, match=r"cannot be read .* or is damaged"):
        load_official(tmp_path / "text.pth", "dino")
    torch.save({"state_dict": {}, "args": Surprise()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"running code.*Surprise.*weights_only=False"):
        load_official(tmp_path / "code.pth", "dino")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_official(tmp_path / "list.pth", "dino")
    with pytest.raises(ValueError, match=r"it has no encoder\. Its tensors: none at all"):
        load_official({"epoch": 3}, "dino")
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "missing.pth", "dino")


def test_command_makes_a_run_folder(small, tmp_path, capsys):
    torch.save({"state_dict": small}, tmp_path / "moco.pth.tar")
    command_line = [str(tmp_path / "moco.pth.tar"), "--method", "moco-v1", "--data", "fashion"]
    assert command.main(command_line) == 0
    out = capsys.readouterr().out
    assert out.startswith("moco-v1, resnet18; the file has no key_encoder, queue\n")
    state = checkpoint.load(tmp_path / "moco" / "checkpoint.pt")
    images = TensorSplit(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2))
    data = DataSplits("small", images, images, ("a", "b"), 32, (0.5,) * 3, (0.25,) * 3)
    encoder, _ = evaluate.load_encoder(state, data)  # of images of another size, too
    weights = encoder.state_dict()
    assert all(torch.equal(weights[k], small[f"module.encoder_q.{k}"]) for k in weights)
    assert command.main(command_line) == 2
    assert "holds a run already" in capsys.readouterr().err
