"""kNN against the official scripts, and the linear probe and command line on small data."""

import argparse
import dataclasses
import importlib

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as nf

from fastcl import checkpoint, evaluate, models, neighbours, train
from fastcl.config import with_values
from fastcl.data import DataSplits, TensorSplit, load
from fastcl.evaluate import features, knn
from fastcl.methods import METHODS
from fastcl.neighbours import Neighbours, nearest, own_knn


@pytest.mark.parametrize("k", [1, 10, 20, 100])
def test_knn_matches_dino(golden, k):
    data = golden("dino_knn")
    top1 = knn(data["train"], data["ytrain"], data["test"], data["ytest"], k=k)
    assert top1 * 100 == pytest.approx(float(data[f"acc_k{k}"][0]))


def test_knn_matches_instdisc(golden):
    data = golden("instdisc_knn_n300_k50")
    labels, truth = data["labels"].long(), data["test_labels"].long()
    top1 = knn(data["memory"], labels, data["test"], truth, k=50)
    assert top1 * 100 == pytest.approx(float(data["top1"])) or top1 == float(data["top1"])
    predicted = data["f64_pred"].long()
    assert knn(data["memory"], labels, data["test"], predicted, k=50) == 1.0


def clusters(count, seed=0, spread=0.5, dim=12, classes=4):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=g)
    return centre[labels] + spread * torch.randn(count, dim, generator=g), labels


def slow_knn(x, y, x_test, y_test, k, temperature):
    right = 0
    for row, truth in zip(nf.normalize(x_test.double()), y_test):
        s = nf.normalize(x.double()) @ row
        neighbours = sorted(range(len(s)), key=lambda j: (-s[j], j))[:k]
        score = torch.zeros(int(y.max()) + 1, dtype=torch.float64)
        for j in neighbours:
            score[y[j]] += torch.exp(s[j] / temperature)
        right += int(score.argmax() == truth)
    return right / len(x_test)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (7, 0.01), (31, 0.5), (101, 0.07)])
@pytest.mark.parametrize("held", [1 << 24, 256])
def test_knn_matches_the_formula_in_any_chunks(monkeypatch, k, temperature, held):
    monkeypatch.setattr(neighbours, "SIMILARITIES", held)
    train, test = clusters(101, 1, spread=2.0), clusters(37, 2, spread=2.0)
    expected = slow_knn(*train, *test, k, temperature)
    assert 0.3 < expected < 1
    assert knn(*train, *test, k=k, temperature=temperature) == expected


def test_knn_is_the_same_under_autocast():
    """In bfloat16 the cosines of an untrained encoder's features are all the same."""
    (train, labels), (test, truth) = clusters(101, 1, spread=2.0), clusters(37, 2, spread=2.0)
    train, test = train + 300, test + 300
    expected = knn(train, labels, test, truth, k=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn(train, labels, test, truth, k=7) == expected
    assert expected > 0.3


def test_of_equal_neighbours_the_first_are_taken():
    s = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.9, 0.5], [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]])
    value, index = nearest(s, 3)
    assert [sorted(row) for row in index.tolist()] == [[0, 1, 4], [0, 1, 2]]
    assert torch.equal(value, s.gather(1, index))
    same = torch.ones(50, 3)  # everything ties: the first three decide, and class 2 has two of them
    labels = torch.tensor([2, 1, 2] + [0] * 47)
    assert knn(same, labels, same[:1], torch.tensor([2]), k=3) == 1.0
    assert knn(same, labels, same[:1], torch.tensor([1]), k=2) == 1.0  # one vote each: the lower


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, r"k must be in 1 … 20 training rows; got 0"),
        ({"k": 21}, r"k must be in 1 … 20 training rows; got 21"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive; got nan"),
    ],
)
def test_knn_names_a_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        knn(*clusters(20), *clusters(5), **options)


def test_features_are_of_eval_mode_and_leave_the_modes_alone():
    split = TensorSplit(torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8), torch.arange(7))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5))
    model[0].eval()  # a frozen norm inside a model in training
    model[0].running_mean.fill_(0.3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = features(model, split, batch_size=3, normalize=lambda x: x.float() / 50)
    modes = [m.training for m in model]
    assert modes == [False, True, True, True] and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        expected = nf.normalize(model.eval()(split.images / 50))
    torch.testing.assert_close(rows, expected)


def test_neighbours_are_the_papers():
    assert own_knn("instdisc") == Neighbours(200, 0.07)
    assert own_knn("invaspread") == own_knn("moco-v2") == Neighbours(200, 0.1)
    assert own_knn("dino") == own_knn("swav") == Neighbours(20, 0.07)


# The command line


@pytest.fixture
def run(tmp_path):
    """A checkpoint as fastcl.train writes it, and a folder of two plain colours."""
    for split, count in (("train", 6), ("test", 2)):
        for name, colour in (("blue", (10, 20, 200)), ("red", (200, 20, 10))):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shade = tuple(c + 3 * i for c in colour)
                Image.new("RGB", (16, 16), shade).save(folder / f"{i}.png")
    torch.manual_seed(0)  # the same encoder whatever ran before
    encoder = models.build("tiny-resnet", image_size=16)
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    values = {"backbone": "tiny-resnet", "image_size": None, "augmentation": "moco-v2"}
    values |= {"method": "moco-v2"}
    values |= {"data": "folder", "data_dir": str(tmp_path / "data")}
    state = {"values": values, "method": {**weights, "head.weight": torch.ones(2)}}
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    return tmp_path


def test_command_prints_the_accuracies(run, capsys):
    code = evaluate.main(["--checkpoint", str(run), "--k", "3", "--linear", "swav"])
    out = capsys.readouterr().out
    assert code == 0 and out == "kNN (k = 3): 100.00%\nlinear (swav): 100.00%\n"


def test_command_takes_the_papers_protocol(run, capsys, monkeypatch):
    monkeypatch.setitem(neighbours.KNN, "moco", Neighbours(5, 0.1))  # 12 training images
    flags = "--knn paper --linear paper --views --epochs 3"
    assert evaluate.main(["--checkpoint", str(run), *flags.split()]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "kNN (k = 5): 100.00%" and second.startswith("linear (moco): ")
    assert evaluate.main(["--checkpoint", str(run), "--knn", "moco", "--k", "2"]) == 0
    assert capsys.readouterr().out == "kNN (k = 2): 100.00%\n"


def test_views_are_cropped_anew_and_not_trained_on(run):
    """Features of other crops in each epoch, by an encoder in eval mode."""
    state = checkpoint.load(run / "checkpoint.pt")
    data = load("folder", data_dir=run / "data")
    encoder, normalize = evaluate.load_encoder(state, data)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    args = argparse.Namespace(seed=0, device="cpu", batch_size=5)
    views = evaluate.views_of(encoder, data, lambda x: normalize(x) * torch.rand(16), args)
    first, second = views(0), views(1)
    assert first.shape == (12, 128) and (first - second).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_command_fine_tunes_and_distils(run, capsys):
    flags = [
        "--k",
        "3",
        "--finetune",
        "quick",
        "--labels",
        "0.5",
        "--epochs",
        "40",
        "--distill",
        "1",
    ]
    assert evaluate.main(["--checkpoint", str(run), *flags]) == 0
    _, tuned, distilled = capsys.readouterr().out.splitlines()
    assert tuned == "fine-tuned (quick, 50% of the labels): 100.00%"
    assert distilled == "distilled (τ = 1): 100.00%"


@pytest.mark.parametrize("labels, images, epochs", [(0.01, 2, 60), (0.1, 2, 30), (1.0, 12, 30)])
def test_fine_tuning_on_a_share_of_the_labels(run, capsys, monkeypatch, labels, images, epochs):
    """1 %, 10 % and all of them, one of each class at least, for as long as SimCLR trains."""
    seen = []

    def finetune(body, features, images, labels, classes, **options):
        seen.append((len(images), sorted(set(labels.tolist())), options["epochs"]))
        return nn.Sequential(body, nn.Linear(features, classes))

    monkeypatch.setattr(evaluate.finetune, "finetune", finetune)
    flags = f"--k 3 --finetune simclr --labels {labels}"
    assert evaluate.main(["--checkpoint", str(run), *flags.split()]) == 0
    assert seen == [(images, [0, 1], epochs)]
    assert f"fine-tuned (simclr, {labels:.0%} of the labels): " in capsys.readouterr().out


def test_simclr_v2_is_fine_tuned_from_the_middle_of_its_head(run, capsys):
    """With few labels the first layer of the head is part of the network; with all it is not."""
    method = METHODS["simclr-v2"]
    values = checkpoint.load(run / "checkpoint.pt")["values"]
    config = with_values(method.recipes["quick"], values)
    torch.manual_seed(7)
    trained = method(method.build_encoder(config, 16), config).eval()
    values |= dataclasses.asdict(config) | {"method": "simclr-v2"}
    state = {"values": values, "method": trained.state_dict()}
    data = load("folder", data_dir=run / "data")
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        h = trained.encoder(images)
        for labels, expected in (
            (0.01, trained.head[1](trained.head[0](h)).relu()),
            (0.1, trained.head[1](trained.head[0](h)).relu()),
            (1.0, h),
        ):
            body, features, _ = evaluate.load_body(state, data, labels)
            torch.testing.assert_close(body.eval()(images), expected)
            assert features == expected.shape[1]
    checkpoint.save(run / "checkpoint.pt", state)
    flags = "--k 3 --finetune simclr-v2 --labels 0.5 --epochs 30"
    assert evaluate.main(["--checkpoint", str(run), *flags.split()]) == 0
    assert "fine-tuned (simclr-v2, 50% of the labels): " in capsys.readouterr().out


def test_load_encoder_restores_weights_and_normalisation(run):
    state = checkpoint.load(run / "checkpoint.pt")
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    split = TensorSplit(images, torch.zeros(4, dtype=torch.int64))
    data = DataSplits("x", split, split, ("a",), 16, (0.5,) * 3, (0.25,) * 3)
    encoder, normalize = evaluate.load_encoder(state, data)
    stored = state["method"]
    assert all(torch.equal(v, stored[f"encoder.{k}"]) for k, v in encoder.state_dict().items())
    assert normalize(images).eq(-2).all()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "missing.pt"], "missing.pt"),
        (["--k", "13"], "k must be in 1 … 12 training rows; got 13"),
        (["--data", "mnist"], "unknown data 'mnist'"),
        (["--data-dir", "nowhere"], "nowhere is no folder"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(run, capsys, flags, message):
    assert evaluate.main(["--checkpoint", str(run / "checkpoint.pt"), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "method, flags",
    [
        ("cmc", ""),
        ("cpc", "--image-size 16 --patch 8 --stride 2 --window 8"),
        ("dino", "--recipe quick"),
    ],
)
def test_what_a_method_keeps_is_evaluated_from_its_checkpoint(
    run, method, flags, monkeypatch, capsys
):
    """The accuracy that training ended with; of two encoders, of patches, of the teacher."""
    module = importlib.import_module(f"fastcl.methods.{method}")
    monkeypatch.setitem(METHODS, method, getattr(module, method.upper()))
    output = run / "trained"
    small = "--backbone tiny-resnet --batch-size 4 --epochs 1 --workers 0"
    where = f"--data folder --data-dir {run / 'data'} --output {output}"
    assert train.main(f"--method {method} {flags} {small} {where}".split()) == 0
    capsys.readouterr()
    state = checkpoint.load(output / "checkpoint.pt")
    data = load("folder", data_dir=run / "data")
    encoder, normalize = evaluate.load_encoder(state, data)
    top1 = evaluate.knn_accuracy(encoder, data, normalize=normalize)
    assert top1 == state["knn"][state["step"]]
    kept = METHODS[method].kept + "."
    assert all(torch.equal(v, state["method"][kept + k]) for k, v in encoder.state_dict().items())
    assert evaluate.main(["--checkpoint", str(output), "--k", "3"]) == 0
    assert capsys.readouterr().out.startswith("kNN (k = 3): ")
