"""Small crops beside the large ones, for every method that can use them: the formula by hand."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from fastcl.methods import METHODS
from fastcl.methods.base import Progress

AT = Progress(step=3, steps_per_epoch=10, epochs=2)
TAKES = ("byol", "byol-v2", "moco-v1", "moco-v2", "moco-v3", "simclr-v1", "simclr-v2", "simsiam")
SMALL = {
    "byol": {"hidden": 12, "dim": 4},
    "byol-v2": {"hidden": 16, "dim": 4, "norm_groups": 2},
    "moco-v1": {"dim": 4, "queue_size": 11, "bn_splits": 1},
    "moco-v2": {"dim": 4, "queue_size": 11, "bn_splits": 1},
    "moco-v3": {"hidden": 12, "dim": 4, "temperature": 0.5},
    "simclr-v1": {"dim": 4},
    "simclr-v2": {"dim": 4},
    "simsiam": {"dim": 4, "hidden": 3},
}


def views_of(small):
    generator = torch.Generator().manual_seed(1)
    sizes = [12, 12] + [8] * small
    return [torch.rand(6, 3, size, size, generator=generator) for size in sizes]


def make(method, encoder, small, **options):
    cls = METHODS[method]
    config = type(cls.recipes["paper"])(small_crops=small, **SMALL[method], **options)
    torch.manual_seed(2)
    return cls(encoder, config).eval()


def nt_xent(a, b, temperature):
    """The mean over 2N rows, from the whole matrix of similarities."""
    z = normalize(torch.cat((a, b)), dim=1)
    s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return cross_entropy(s, torch.arange(len(z)).roll(len(a)))


def pair_loss(method, made, views, i, v):
    """ℓ(i, v), once for each direction of a pair: what a loss of two crops adds or averages."""
    if method in ("byol", "byol-v2"):
        p, z = made.predictor(made.online(views[v])), made.target(views[i])
        return 2 - 2 * cosine_similarity(p, z).mean()
    if method == "simsiam":
        p, z = made.predictor(made.projector(made.encoder(views[v]))), made.encoder(views[i])
        return -cosine_similarity(p, made.projector(z)).mean()
    if method == "moco-v3":
        q = normalize(made.predictor(made.base_encoder(views[v])), dim=1)
        k = normalize(made.key_encoder(views[i]), dim=1)
        tau = made.config.temperature
        return 2 * tau * cross_entropy(q @ k.T / tau, torch.arange(len(q)))
    if method.startswith("moco"):
        q = normalize(made.query_encoder(views[v]), dim=1)
        k = normalize(made.key_encoder(views[i]), dim=1)
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat([own, q @ made.queue.features.T], 1) / made.config.temperature
        return cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
    z = [made.head(made.encoder(views[j])) for j in (i, v)]
    return 2 * nt_xent(*z, made.config.temperature)


@pytest.mark.parametrize("small", [0, 3])
@pytest.mark.parametrize("method", TAKES)
def test_loss_is_the_mean_over_pairs(tiny_encoder, method, small):
    views = views_of(small)
    made = make(method, tiny_encoder(), small)
    loss = made.loss(views, AT)
    of = (1,) if method in ("moco-v1", "moco-v2") else (0, 1)  # an asymmetric loss has keys of one
    with torch.no_grad():
        pairs = [
            pair_loss(method, made, views, i, v) for i in of for v in range(len(views)) if v != i
        ]
    sides = 2 if method in ("byol", "byol-v2", "moco-v3") else 1  # two directions are added there
    torch.testing.assert_close(loss.detach(), sides * torch.stack(pairs).mean())
    loss.backward()
    assert all(p.grad is not None for p in made.encoder.parameters())
    assert made.embedding.shape == (6, 4)


def test_symmetric_moco_has_keys_of_both_large_crops(tiny_encoder):
    views = views_of(2)
    made = make("moco-v2", tiny_encoder(), 2, symmetric=True)
    loss = made.loss(views, AT)
    with torch.no_grad():
        sums = [
            torch.stack(
                [pair_loss("moco-v2", made, views, i, v) for v in range(4) if v != i]
            ).mean()
            for i in (0, 1)
        ]
    torch.testing.assert_close(loss.detach(), sums[0] + sums[1])
    assert made.keys.shape == (12, 4)


@pytest.mark.parametrize("method", (*TAKES, "swav", "dino"))
def test_crops_are_those_that_the_flags_ask_for(no_encoder, method):
    cls = METHODS[method]
    config = type(cls.recipes["paper"])(small_crops=4, small_scale=(0.1, 0.2))
    with torch.device("meta"):
        made = cls(no_encoder(8), config)
    large, small = made.crops(224)
    assert (large.count, large.size) == (2, 224)
    assert (small.count, small.size, small.scale) == (4, 96, (0.1, 0.2))
    with torch.device("meta"):
        two = cls(no_encoder(8), type(config)(small_crops=0))
    assert [c.count for c in two.crops(224)] == [2]


def test_each_target_and_key_is_of_a_large_crop(tiny_encoder):
    """The momentum encoders never see a small crop."""
    for method, copy in (
        ("byol", "target"),
        ("moco-v3", "key_encoder"),
        ("moco-v2", "key_encoder"),
    ):
        made = make(method, tiny_encoder(), 2)
        seen = []
        made.get_submodule(copy).register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].shape[-1])
        )
        made.loss(views_of(2), AT)
        assert set(seen) == {12}


def test_simclr_v2s_memory_takes_no_small_crops(tiny_encoder):
    with pytest.raises(ValueError, match="memory is of two crops"):
        make("simclr-v2", tiny_encoder(), 2, memory=True)


def test_a_transformer_of_moco_v3_takes_small_crops():
    """Its fixed positions follow the size; at its own size they are as they were."""
    from fastcl import models

    vit = models.build("vit-small-moco-v3", image_size=48).eval()
    with torch.no_grad():
        large, small = vit(torch.rand(1, 3, 48, 48)), vit(torch.rand(1, 3, 32, 32))
    assert large.shape == small.shape == (1, 384)
