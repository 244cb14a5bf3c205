"""kNN against the official scripts, and the linear probe and command line on small data."""

import argparse
import dataclasses
import importlib
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as nf

from fastcl import checkpoint, evaluate, models, neighbours, train
from fastcl.config import with_values
from fastcl.data import DataSplits, TensorSplit, load
from fastcl.evaluate import PROTOCOLS, Protocol, features, knn, linear_probe
from fastcl.methods import METHODS
from fastcl.neighbours import Neighbours, nearest, own_knn
from fastcl.optim import LARS
from fastcl.probe import LastBlocks, own_protocol, probed


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


@pytest.mark.parametrize(
    "name, expected",
    [
        ("moco", Protocol(30.0, 100, 256, milestones=(60, 80))),
        ("simclr", Protocol(0.1 * 4096 / 256, 90, 4096, nesterov=True, zero_init=True)),
        ("swav", Protocol(0.3, 100, 256, weight_decay=1e-6)),
        ("byol", Protocol(0.2 * 1024 / 256, 80, 1024, nesterov=True)),
        ("simsiam", Protocol(0.1 * 4096 / 256, 90, 4096, larc=True)),
        ("moco-v3", Protocol(0.1 * 1024 / 256, 90, 1024)),
        ("moco-v3-vit", Protocol(3 * 1024 / 256, 90, 1024)),
        ("dino", Protocol(0.001 * 1024 / 256, 100, 1024, blocks=4)),
        ("dino-base", Protocol(0.001 * 1024 / 256, 100, 1024, patches=True)),
        ("cpc", Protocol(0.1, 136, 2048, milestones=(80, 120))),
        ("cmc", Protocol(30.0, 60, 256, milestones=(30, 40, 50), factor=0.2)),
        ("cmc-wide", Protocol(50.0, 60, 256, milestones=(30, 40, 50), factor=0.2)),
        ("cmc-alexnet", Protocol(0.1, 60, 256, milestones=(30, 40, 50), factor=0.2)),
    ],
)
def test_protocols_are_the_papers(name, expected):
    assert PROTOCOLS[name] == expected
    assert expected.momentum == 0.9


def test_cpc_counts_the_updates_of_imagenet():
    """50,000, 25,000 and 10,000 of 2,048 images."""
    epochs = [round(updates * 2048 / 1_281_167) for updates in (50_000, 75_000, 85_000)]
    assert (*PROTOCOLS["cpc"].milestones, PROTOCOLS["cpc"].epochs) == tuple(epochs)


def test_every_method_has_a_protocol_of_its_own_or_mocos():
    own = {
        "invaspread": "moco",
        "instdisc": "moco",
        "moco-v1": "moco",
        "moco-v2": "moco",
        "simclr-v1": "simclr",
        "simclr-v2": "simclr",
        "byol": "byol",
        "byol-v2": "byol",
        "cpc": "cpc",
        "cmc": "cmc",
        "swav": "swav",
        "simsiam": "simsiam",
        "moco-v3": "moco-v3",
        "dino": "dino",
    }
    assert {method: own_protocol(method) for method in METHODS} == own
    assert own_protocol("moco-v3", "vit-small-moco-v3") == "moco-v3-vit"
    assert own_protocol("dino", "vit-base-dino") == "dino-base"
    assert own_protocol("cmc", "resnet50", 2.0) == "cmc-wide"
    assert own_protocol("cmc", "alexnet-bn") == "cmc-alexnet"


def test_neighbours_are_the_papers():
    assert own_knn("instdisc") == Neighbours(200, 0.07)
    assert own_knn("invaspread") == own_knn("moco-v2") == Neighbours(200, 0.1)
    assert own_knn("dino") == own_knn("swav") == Neighbours(20, 0.07)


def by_hand(protocol, x, y, optimizer_of, schedule, seed=5):
    """The boundary that a protocol ends with on all rows at once: an nn.Linear trained by torch."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(x.shape[1], 2)
    with torch.no_grad():
        model.weight.copy_(0.01 * torch.randn(2, x.shape[1], generator=g))
        if protocol.zero_init:
            model.weight.zero_()
        model.bias.zero_()
    optimizer = optimizer_of(model)
    for epoch in range(protocol.epochs):
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr * schedule(epoch)
        optimizer.zero_grad()
        nf.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["simsiam", "simclr", "cmc", "dino"])
def test_linear_probe_follows_the_protocol(name):
    """LARC, zeros at first, a fifth at each milestone, a cosine: torch's own steps by hand."""
    x, y = clusters(30, 1, classes=2, spread=2.0)
    p = PROTOCOLS[name]

    def optimizer_of(model):
        if p.larc:
            return LARS.larc(model.named_parameters(), p.lr, momentum=0.9, weight_decay=0.0)
        return torch.optim.SGD(model.parameters(), p.lr, 0.9, nesterov=p.nesterov)

    def schedule(epoch):
        if name == "cmc":
            return 0.2 ** sum(epoch >= m for m in (30, 40, 50))
        return (1 + math.cos(math.pi * epoch / p.epochs)) / 2

    model = by_hand(p, x, y, optimizer_of, schedule)
    g = torch.Generator().manual_seed(6)
    probes = torch.randn(4000, 12, generator=g) * 3
    logits = model(probes) @ torch.tensor([1.0, -1.0])
    order = logits.abs().argsort()
    near, nearest_ones = order[20:1020], order[:20]
    predicted = (logits < 0).long()
    assert linear_probe(x, y, probes[near], predicted[near], p, seed=5) == 1.0
    other = dataclasses.replace(p, lr=p.lr / 3, epochs=p.epochs // 2)
    assert linear_probe(x, y, probes[order[:1020]], predicted[order[:1020]], other, seed=5) < 1.0
    assert len(nearest_ones) == 20


def test_linear_probe_takes_other_views_in_each_epoch():
    train, test = clusters(60, 1), clusters(60, 2)
    asked = []

    def views(epoch):
        asked.append(epoch)
        return train[0] + 0.1 * epoch

    protocol = Protocol(lr=0.5, epochs=4, batch_size=64)
    linear_probe(views, train[1], *test, protocol)
    assert asked == [0, 1, 2, 3]
    fixed = linear_probe(lambda epoch: train[0], train[1], *test, protocol)
    assert fixed == linear_probe(*train, *test, protocol)


def test_last_blocks_are_dinos():
    """timm's own intermediate tokens, each after the last norm; tiny-vit has means for a class."""
    vit = models.build("vit-tiny-dino", image_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    layers = vit.get_intermediate_layers(images, n=4, return_prefix_tokens=True, norm=True)
    own = torch.cat([prefix[:, 0] for _, prefix in layers], 1)
    with torch.no_grad():
        torch.testing.assert_close(probed(vit, PROTOCOLS["dino"])(images), own)
        patches, prefix = layers[-1]
        both = torch.cat([prefix[:, 0], patches.mean(1)], 1)
        torch.testing.assert_close(probed(vit, PROTOCOLS["dino-base"])(images), both)
        torch.testing.assert_close(LastBlocks(vit, 1)(images), vit(images))
        tiny = models.build("tiny-vit", image_size=16).eval()
        four = LastBlocks(tiny, 4)(images)
        assert four.shape == (2, 4 * 96)
        torch.testing.assert_close(four[:, -96:], tiny(images))
    resnet = models.build("tiny-resnet", image_size=16)
    assert probed(resnet, PROTOCOLS["dino"]) is resnet
    assert probed(vit, PROTOCOLS["swav"]) is vit
    assert not any(block._forward_hooks for block in vit.blocks)


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
