"""The `paper` recipes: what they say, what they build at their own size, and a step of two of them.

They are for ImageNet and are not trained here. Networks are built without memory, on PyTorch's meta
device, where shapes are all there is.
"""

import dataclasses

import pytest
import torch
import yaml

from fastcl.data import augment
from fastcl.methods import METHODS, Progress
from fastcl.optim import learning_rate_at, optimizer_of
from fastcl.train import main

PAPER = [
    (method, recipe)
    for method, cls in METHODS.items()
    for recipe in cls.recipes
    if recipe.startswith("paper")
]
RESNET50, VIT_SMALL = 23_508_032, 21_665_664  # parameters without the classifier
ENCODERS = {  # (parameters, features) of what is kept
    ("instdisc", "paper"): (RESNET50, 2048),
    ("invaspread", "paper"): (11_168_832, 512),
    ("moco-v1", "paper"): (RESNET50, 2048),
    ("simclr-v1", "paper"): (RESNET50, 2048),
    ("moco-v2", "paper"): (RESNET50, 2048),
    ("simclr-v2", "paper"): (RESNET50, 2048),
    ("swav", "paper"): (RESNET50, 2048),
    ("byol", "paper"): (RESNET50, 2048),
    ("byol-v2", "paper"): (RESNET50, 2048),
    ("simsiam", "paper"): (RESNET50, 2048),
    ("moco-v3", "paper"): (RESNET50, 2048),
    ("moco-v3", "paper-vit"): (VIT_SMALL, 384),
    ("dino", "paper"): (VIT_SMALL, 384),
    ("dino", "paper-resnet"): (RESNET50, 2048),
    ("cpc", "paper"): (None, 1024),  # a ResNet-v2-101 to its third stage
    ("cmc", "paper"): (None, 2 * 1024),  # two encoders of half the width
}
HEADS = {  # parameters of the parts after the encoder, as the papers give their layers
    ("instdisc", "head"): 2048 * 128 + 128,
    ("moco-v2", "head"): 2048 * 2048 + 2048 + 2048 * 128 + 128,
    ("simclr-v1", "head"): 2048 * 2048 + 2 * 2048 + 2048 * 128 + 2 * 128,
    ("simclr-v2", "head"): 2 * (2048 * 2048 + 2 * 2048) + 2048 * 128 + 2 * 128,
    ("swav", "head"): 2048 * 2048 + 3 * 2048 + 2048 * 128 + 128,
    ("swav", "prototypes"): 3000 * 128,
    ("byol", "projector"): 2048 * 4096 + 3 * 4096 + 4096 * 256,
    ("byol", "predictor"): 256 * 4096 + 3 * 4096 + 4096 * 256,
    ("simsiam", "projector"): 3 * 2048 * 2048 + 2 * 2 * 2048 + 2048,
    ("simsiam", "predictor"): 2048 * 512 + 2 * 512 + 512 * 2048 + 2048,
    ("moco-v3", "projector"): 2048 * 4096 + 2 * 4096 + 4096 * 256,
    ("moco-v3", "predictor"): 256 * 4096 + 2 * 4096 + 4096 * 256,
    ("dino", "head"): 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 65536 * 257,
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("method, recipe", PAPER)
def test_print_config_shows_every_number(capsys, method, recipe):
    assert main(["--method", method, "--recipe", recipe, "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    for name, value in dataclasses.asdict(METHODS[method].recipes[recipe]).items():
        assert shown[name] == (list(value) if isinstance(value, tuple) else value)
    assert (shown["method"], shown["recipe"]) == (method, recipe)


@pytest.mark.parametrize("method, recipe", PAPER)
def test_networks_have_the_published_sizes(method, recipe):
    cls = METHODS[method]
    config = cls.recipes[recipe]
    size = config.image_size or (32 if method == "invaspread" else 224)
    with torch.device("meta"):
        made = cls(cls.build_encoder(config, size), config)
        made.set_images(1_281_167)
        channels = {"lab": 3, "grey": 1}.get(config.colours, 3)
        features = made.encoder.eval()(torch.empty(2, channels, size, size))
    count, dim = ENCODERS[method, recipe]
    kept = made.get_submodule(made.kept)
    assert features.shape == (2, dim) and kept.feature_dim == dim
    if count is not None:
        assert parameters(kept) == count
    for (name, part), expected in HEADS.items():
        if (name, "paper") == (method, recipe):
            assert parameters(made.get_submodule(part)) == expected


@pytest.mark.parametrize("method, recipe", PAPER)
def test_augmentation_and_schedule_are_there(method, recipe):
    """As many views as crops; a learning rate that reaches its peak and ends near nothing."""
    cls = METHODS[method]
    config = cls.recipes[recipe]
    size = config.image_size or (32 if method == "invaspread" else 224)
    with torch.device("meta"):
        made = cls(cls.build_encoder(config, size), config)
    crops = made.crops(size)
    built = augment.build(
        config.augmentation,
        image_size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crops=crops,
        strength=config.jitter,
        blur=config.blur,
        colours=config.colours,
    )
    assert len(built.lists) == sum(c.count for c in crops)
    images = 1_281_167
    steps = config.epochs * (images // config.batch_size)
    rates = [
        learning_rate_at(step, config, images) for step in range(0, steps, max(1, steps // 2000))
    ]
    assert max(rates) == pytest.approx(config.lr, rel=0.02)
    assert rates[-1] <= 0.011 * config.lr or method == "cpc"  # which has no schedule


STEPS = {  # a step at the recipe's own widths, on few small images
    ("simsiam", "paper"): {"batch_size": 4},
    ("dino", "paper"): {"batch_size": 2, "small_crops": 2, "small_size": 16},
}


@pytest.mark.parametrize("method, recipe", STEPS)
def test_a_step(method, recipe):
    """Networks, loss and optimizer together: every weight that may move moves, by finite steps."""
    torch.manual_seed(0)
    cls = METHODS[method]
    config = dataclasses.replace(cls.recipes[recipe], **STEPS[method, recipe])
    made = cls(cls.build_encoder(config, 32), config).train()
    names = [(name, p) for name, p in made.named_parameters() if p.requires_grad]
    optimizer = optimizer_of(made, config)
    before = [p.detach().clone() for _, p in names]
    at = Progress(step=0, steps_per_epoch=1, epochs=100)
    views = [
        torch.randn(config.batch_size, 3, crop.size, crop.size)
        for crop in made.crops(32)
        for _ in range(crop.count)
    ]
    loss = made.loss(views, at)
    loss.backward()
    made.after_backward(at)
    optimizer.step()
    made.after_step(at)
    assert loss.isfinite()
    still = [name for (name, p), old in zip(names, before, strict=True) if torch.equal(p, old)]
    assert all(p.isfinite().all() for _, p in names)
    # The last batch norm of a residual block is 0 at first: nothing before it has a gradient, and
    # weight decay leaves zeros alone. DINO's last layer is fixed for an epoch.
    inside = [n for n in still if n.startswith("encoder.layer") and n.endswith(".bias")]
    assert still == {"simsiam": inside, "dino": ["head.last_layer.weight_v"]}[method]
