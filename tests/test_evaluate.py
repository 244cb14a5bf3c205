"""kNN against the official scripts, and the linear probe and command line on small data."""

import importlib

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as nf

from fastcl import checkpoint, evaluate, models, train
from fastcl.data import DataSplits, TensorSplit, load
from fastcl.evaluate import PROTOCOLS, Protocol, features, knn, linear_probe, nearest
from fastcl.methods import METHODS


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
    monkeypatch.setattr(evaluate, "SIMILARITIES", held)
    train, test = clusters(101, 1, spread=2.0), clusters(37, 2, spread=2.0)
    expected = slow_knn(*train, *test, k, temperature)
    assert 0.3 < expected < 1
    assert knn(*train, *test, k=k, temperature=temperature) == expected


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


def test_linear_probe_finds_separable_classes_and_no_others():
    train, test = clusters(300, 1), clusters(100, 2)
    protocol = Protocol(lr=0.5, epochs=20, batch_size=64)
    assert linear_probe(*train, *test, protocol) > 0.95
    noise = torch.randn(300, 12), train[1]
    assert linear_probe(*noise, torch.randn(100, 12), test[1], protocol) < 0.5


def test_linear_probe_is_its_optimizer():
    """One class against the other, full batch: the same steps by hand with torch's SGD."""
    x, y = clusters(30, 1, classes=2)
    p = Protocol(
        lr=0.3, epochs=6, batch_size=30, weight_decay=0.1, nesterov=True, milestones=(2, 4)
    )
    g = torch.Generator().manual_seed(5)
    model = nn.Linear(12, 2)
    with torch.no_grad():
        model.weight.copy_(0.01 * torch.randn(2, 12, generator=g))
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), p.lr, 0.9, weight_decay=0.1, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, (2, 4), 0.1)
    for _ in range(6):
        optimizer.zero_grad()
        nf.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    # Test rows near the boundary that this model draws: any other boundary errs on some.
    probes = torch.randn(4000, 12, generator=g)
    margin = (model(probes) @ torch.tensor([1.0, -1.0])).abs()
    probes = probes[margin.argsort()[100:1100]]
    predicted = model(probes).argmax(1)
    assert linear_probe(x, y, probes, predicted, p, seed=5) == 1.0
    assert linear_probe(x, y, probes, predicted, Protocol(lr=0.3, epochs=1), seed=5) < 1.0


def test_protocols_are_the_papers():
    assert PROTOCOLS["moco"].lr == 30 and PROTOCOLS["moco"].milestones == (60, 80)
    assert PROTOCOLS["simclr"].lr == pytest.approx(0.1 * 4096 / 256)
    assert PROTOCOLS["swav"].weight_decay == 1e-6


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
