"""The linear probe, and the protocols of the papers."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as nf

from fastcl import models
from fastcl.methods import METHODS
from fastcl.optim import LARS
from fastcl.probe import PROTOCOLS, LastBlocks, Protocol, linear_probe, own_protocol, probed


def clusters(count, seed=0, spread=0.5, dim=12, classes=4):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=g)
    return centre[labels] + spread * torch.randn(count, dim, generator=g), labels


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
