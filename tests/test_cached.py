"""Small passes of the encoder, and the loss and gradient of the whole batch all the same."""

import copy
import dataclasses

import pytest
import torch
from small_run import rows
from torch import nn

import fastcl.functional as F
from fastcl.cached import cached, in_chunks_
from fastcl.methods import METHODS
from fastcl.methods.base import Progress
from fastcl.models.norms import careful_init_, make_norm, replace_batch_norm
from fastcl.train import main

CHANGES = {  # of the quick recipes: a smaller method, and its options that touch the encoder
    "moco-v1": {"queue_size": 24, "symmetric": True},
    "simclr-v2": {"memory": True, "queue_size": 24},
    "swav": {"prototypes": 12, "hidden": 16, "small_crops": 2, "queue_size": 16},
    "instdisc": {"loss": "nce", "negatives": 5},
    "cpc": {"image_size": 16, "patch": 8, "stride": 2, "window": 6},
    "dino": {"hidden": 8, "dim": 8, "outputs": 12, "small_crops": 2},
}


def network(*, norm, drop):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(0.3 if drop else 0.0),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
    )


def gradients(module, encode, x):
    """Loss and gradients (of x too), buffers afterwards, and the next random number."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    torch.manual_seed(1)
    loss = F.nt_xent(*encode(module, x).chunk(2))
    loss.backward()
    return [
        *(loss.detach(), x.grad, torch.rand(3)),
        *(p.grad for p in module.parameters()),
        *module.buffers(),
    ]


def in_place(module, x):
    in_chunks_(module, 16)
    return module(x)


@pytest.mark.parametrize(
    "encode", [lambda m, x: cached(m, x, 16), in_place], ids=["call", "inplace"]
)
def test_dropout_batch_norm_and_random_numbers_are_those_of_a_loop_over_chunks(encode):
    """Bit for bit: statistics move once, dropout's mask is the same in both passes."""
    module, x = network(norm=True, drop=True), torch.randn(50, 3, 8, 8)
    expected = gradients(module, lambda m, x: torch.cat([m(c) for c in x.tensor_split(4)]), x)
    for a, b in zip(expected, gradients(module, encode, x), strict=True):
        assert torch.equal(a, b)


def test_gradient_is_that_of_the_whole_batch_and_not_of_small_batches():
    module, x = network(norm=False, drop=False).double(), torch.randn(50, 3, 8, 8).double()
    whole = gradients(module, lambda m, x: m(x), x)
    for a, b in zip(whole, gradients(module, lambda m, x: cached(m, x, 7), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    z = module(x).chunk(2)
    apart = sum(F.nt_xent(a, b) for a, b in zip(z[0].chunk(2), z[1].chunk(2))) / 2
    assert abs(apart - whole[0]) > 0.1  # what ordinary accumulation would have minimised


def quick(method):
    """The method in float64, group norm for batch norm in the encoder, and views of 16 pixels."""
    cls = METHODS[method]
    config = dataclasses.replace(cls.recipes["quick"], **CHANGES.get(method, {}))
    torch.manual_seed(0)
    made = cls(replace_batch_norm(cls.build_encoder(config, 16), "gn"), config)
    made.set_images(100)
    views = [
        torch.randn(8, 3 if config.colours != "grey" else 1, crops.size, crops.size)
        for crops in made.crops(16)
        for _ in range(crops.count)
    ]
    return made.double().train(), [view.double() for view in views]


@pytest.mark.filterwarnings("ignore:queue_size")
@pytest.mark.parametrize("method", METHODS)
def test_every_methods_gradients_and_state_are_those_of_the_whole_batch(method):
    results = []
    for rows_at_once in (0, 3):
        made, views = quick(method)
        passes: list[int] = []

        def watch(_, given, passes=passes):
            passes.append(len(given[0]))

        for encoder in made.encoders():
            first = next(part for part in encoder.modules() if isinstance(part, nn.Conv2d))
            first.register_forward_pre_hook(watch)
            if rows_at_once:
                in_chunks_(encoder, rows_at_once)
        torch.manual_seed(1)
        at = Progress(40, 10, 20, torch.arange(8))
        loss = made.loss(views, at)
        loss.backward()
        made.after_backward(at)
        made.after_step(at)
        grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads, made.state_dict(), torch.rand(2)))
        assert max(passes) <= 3 if rows_at_once else max(passes) >= 8
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-12)
    assert any(name.startswith("encoder") for name in results[0][1])


def test_careful_initialisation_takes_the_first_rows():
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), make_norm("none", 8, careful=True))
    x = torch.randn(12, 3, 8, 8) * torch.linspace(1, 4, 12)[:, None, None, None]
    in_chunks_(encoder, 4)
    careful_init_(encoder, x)
    first = encoder(x[:4])
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.var((0, 2, 3), correction=0), torch.ones(8), rtol=0, atol=1e-3)


def peak_bytes(step):
    """The most that is allocated at a time while step runs, by the allocator's own events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in memory:
        held += change
        most = max(most, held)
    return most


def test_activations_of_one_chunk_are_held_rather_than_of_the_batch():
    encoder = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()) for _ in range(6)), nn.Flatten()
    )
    x = torch.randn(64, 4, 16, 16)

    def step(rows):
        z = encoder(x) if rows == 64 else cached(encoder, x, rows)
        z.square().sum().backward()

    step(8)
    whole, chunks = peak_bytes(lambda: step(64)), peak_bytes(lambda: step(8))
    activation = x.numel() * 4
    assert whole > 11 * activation  # twelve layers
    assert chunks < 6 * activation  # features and their gradients, and an eighth of the layers'


def test_without_gradients_it_is_chunk_by_chunk_and_few_rows_are_one_pass():
    module, sizes = network(norm=False, drop=False), []
    module.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    x = torch.randn(10, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(cached(module, x, 4), module(x))
    assert sizes == [4, 3, 3, 10]
    cached(module, x, 10)
    assert sizes[4:] == [10]


@pytest.mark.parametrize("call", [lambda: cached(nn.Identity(), torch.ones(2), 0),
                                  lambda: in_chunks_(nn.Identity(), -1)])  # fmt: skip
def test_rows_must_be_one_or_more(call):
    with pytest.raises(ValueError, match="rows must be at least 1; got"):
        call()


# ---- on the command line -------------------------------------------------------------------------


def test_a_run_of_small_passes_is_the_run_of_whole_ones(flags, tmp_path):
    extra = "--encoder-norm gn --eval-every 0"  # group norm: chunks then change nothing
    assert main(flags("byol-v2", "whole", extra)) == 0
    assert main(flags("byol-v2", "chunks", f"{extra} --micro-batch 6")) == 0
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "chunks"), strict=True):
        for key in {"step", "loss", "feature_std", "lr"} & a.keys():
            # AdamW's first steps are the gradient's sign: rounding shows.
            assert a[key] == pytest.approx(b[key], rel=5e-3)
