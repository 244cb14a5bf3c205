"""ema_update_ against the float64 formula, the published implementations, and a second update."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastcl.functional as F
from fastcl import _C

on_each_backend = pytest.mark.usefixtures("backend")
on_the_kernels = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A scalar, an empty tensor, ragged ends; more than one chunk of work in a tensor and across them.
SHAPES = [(), (0,), (3,), (129, 33), (17,), (64, 3, 3, 3), (70001,), (5, 1), (66000,)]


def tensors(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@on_each_backend
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize(("into", "of"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_matches_float64(into: torch.dtype, of: torch.dtype, momentum: float) -> None:
    targets, sources = tensors(into, 0), tensors(of, 1)
    truths = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources)]
    F.ema_update_(targets, sources, momentum=momentum)
    for target, truth in zip(targets, truths):
        assert target.dtype == into
        # Rounding to the target's dtype once, after float32's own.
        rounding = torch.finfo(into).eps / 2 if into != torch.float32 else 0
        allowed = 3e-7 * truth.abs().clamp_min(1) + rounding * truth.abs()
        assert ((target.double() - truth).abs() <= allowed).all()


@on_each_backend
def test_momentum_zero_copies_and_one_keeps() -> None:
    targets, sources = tensors(torch.float32, 0), tensors(torch.float32, 1)
    kept = [t.clone() for t in targets]
    F.ema_update_(targets, sources, momentum=1.0)
    assert all(map(torch.equal, targets, kept))
    F.ema_update_(targets, sources, momentum=0.0)
    assert all(map(torch.equal, targets, sources))


@on_the_kernels
@pytest.mark.parametrize("momentum", [0.3, 0.99, 0.9999])
def test_equal_weights_stay(momentum: float) -> None:
    targets = tensors(torch.float32, 0)
    kept = [t.clone() for t in targets]
    F.ema_update_(targets, kept, momentum=momentum)
    assert all(map(torch.equal, targets, kept))


@on_each_backend
@pytest.mark.parametrize("variant", ["moco", "dino", "byol"])
def test_is_the_published_update(golden, variant: str) -> None:
    file = golden("ema_variants")
    targets = [file[f"k0_{i}"].clone() for i in range(3)]
    for step, momentum in enumerate(file["m"].tolist()):
        F.ema_update_(targets, [file[f"q_{i}"][step] for i in range(3)], momentum=momentum)
        for i, target in enumerate(targets):
            torch.testing.assert_close(target.double(), file[f"ref_{i}"][step], rtol=0, atol=1e-6)
            torch.testing.assert_close(target, file[f"{variant}_{i}"][step], rtol=0, atol=2e-6)


@on_each_backend
def test_modules_average_their_parameters_only() -> None:
    target, source = (torch.nn.BatchNorm1d(3) for _ in range(2))
    torch.nn.init.constant_(source.weight, 3.0)
    source.running_mean.fill_(5.0)
    F.ema_update_(target, source, momentum=0.75)
    torch.testing.assert_close(target.weight.detach(), torch.full((3,), 1.5))
    assert torch.equal(target.running_mean, torch.zeros(3))


@on_each_backend
def test_layouts_other_than_row_major() -> None:
    generator = torch.Generator().manual_seed(0)
    last = torch.channels_last

    def fresh(layout: str) -> torch.Tensor:
        x = torch.randn(4, 5, 3, 3, generator=generator)
        if layout == "channels_last":
            return x.to(memory_format=last)
        return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x

    for a, b in itertools.product(("plain", "channels_last", "transposed"), repeat=2):
        target, source = fresh(a), fresh(b)
        truth = 0.75 * target.double() + 0.25 * source.double()
        strides = target.stride()
        F.ema_update_([target], [source], momentum=0.75)
        torch.testing.assert_close(target.double(), truth, rtol=0, atol=1e-6)
        assert target.stride() == strides


@on_each_backend
def test_only_the_target_is_written_in_a_view() -> None:
    whole = torch.zeros(5, 40)
    F.ema_update_([whole[1:3]], [torch.ones(2, 40)], momentum=0.5)
    expected = torch.zeros(5, 40)
    expected[1:3] = 0.5
    assert torch.equal(whole, expected)


@on_each_backend
def test_float64_targets_keep_float64() -> None:
    targets = [torch.full((3,), 1.0, dtype=torch.float64), torch.ones(3)]
    sources = [torch.full((3,), 2.0, dtype=torch.float64), torch.full((3,), 2.0)]
    F.ema_update_(targets, sources, momentum=0.9)
    torch.testing.assert_close(
        targets[0], torch.full((3,), 1.1, dtype=torch.float64), rtol=1e-15, atol=0
    )
    torch.testing.assert_close(targets[1], torch.full((3,), 1.1))
    mixed = [torch.ones(3), torch.ones(3, dtype=torch.float64)]
    F.ema_update_(mixed, [x.to(torch.float64) * 2 for x in mixed], momentum=0.9)
    torch.testing.assert_close(mixed[0], torch.full((3,), 1.1))
    torch.testing.assert_close(
        mixed[1], torch.full((3,), 1.1, dtype=torch.float64), rtol=1e-15, atol=0
    )


@on_each_backend
def test_a_tensor_twice_in_the_list_moves_twice() -> None:
    x = torch.zeros(70001)
    F.ema_update_([x, x], [torch.ones(70001)] * 2, momentum=0.5)
    assert torch.equal(x, torch.full((70001,), 0.75))


@on_each_backend
def test_a_nan_is_visible() -> None:
    target = torch.zeros(40)
    source = torch.ones(40)
    source[35] = torch.nan
    F.ema_update_([target], [source], momentum=0.9)
    assert target.isnan().nonzero().flatten().tolist() == [35]


def test_same_bits_for_any_number_of_threads(assert_same_bits) -> None:
    def run() -> list[torch.Tensor]:
        targets = tensors(torch.float32, 0)
        F.ema_update_(targets, tensors(torch.bfloat16, 1), momentum=0.99)
        return targets

    assert_same_bits(run)


@on_each_backend
@pytest.mark.skipif(_C.kernels is None, reason=_C.MISSING)
def test_empty_list_changes_nothing() -> None:
    F.ema_update_([], [], momentum=0.5)
