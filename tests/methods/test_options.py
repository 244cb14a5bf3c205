"""Options that several methods share."""

import pytest
import torch

from fastcl.methods import METHODS

CENTRED = [
    method
    for method, cls in METHODS.items()
    if hasattr(cls.recipes["paper"], "centred_head") and method not in ("cmc", "dino")
]
SMALL = {"swav": {"hidden": 16, "dim": 8}}


@pytest.mark.parametrize("method", CENTRED)
def test_a_centred_head_ends_in_batch_norm_without_parameters(no_encoder, method):
    """Embeddings of mean 0 and variance 1 in every feature, where the papers' heads have none."""
    cls = METHODS[method]
    make = type(cls.recipes["paper"])
    torch.manual_seed(0)
    options = {"dim": 8} | SMALL.get(method, {})
    made = cls(no_encoder(6), make(centred_head=True, **options)).train()
    x = 3 + torch.randn(64, 6)
    z = made.head(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)
    plain = cls(no_encoder(6), make(**options)).train()
    assert plain.head(x).mean(0).abs().max() > 0.05
    assert sum(p.numel() for p in made.head.parameters()) == sum(
        p.numel() for p in plain.head.parameters()
    )
    if hasattr(made, "key_encoder"):
        assert isinstance(made.key_encoder[-1][-1], torch.nn.BatchNorm1d)


def test_depth_of_heads(no_encoder):
    """SimSiam's projector of two layers is CIFAR-10's; SimCLR v2's head of two is v1's."""

    def layers(module):
        return sum(isinstance(part, torch.nn.Linear) for part in module.modules())

    for method, field, part in (
        ("simsiam", "projector_layers", "projector"),
        ("simclr-v2", "head_layers", "head"),
        ("moco-v3", "projector_layers", "projector"),
        ("moco-v3", "predictor_layers", "predictor"),
        ("dino", "head_layers", "head.mlp"),
    ):
        cls = METHODS[method]
        make = type(cls.recipes["paper"])
        with torch.device("meta"):
            for count in (1, 2, 3):
                made = cls(no_encoder(8), make(**{field: count}))
                assert layers(made.get_submodule(part)) == count


def test_small_crops_have_the_side_that_is_asked_for(no_encoder):
    for method in ("swav", "dino", "byol", "moco-v2"):
        cls = METHODS[method]
        config = type(cls.recipes["paper"])(small_crops=3, small_size=17)
        with torch.device("meta"):
            made = cls(no_encoder(8), config)
        assert [crops.size for crops in made.crops(64)] == [64, 17]
