"""The EMA kernel in Triton's interpreter, against the float64 formula."""

import pytest
import streaming
import torch

from fastcl.kernels import ema


def count_launches(monkeypatch):
    launches = []
    original = type(ema.update_kernel).run

    def run(self, *args, **kwargs):
        launches.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(ema.update_kernel), "run", run)
    return launches


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_matches_float64_formula(momentum):
    targets = [streaming.randn(size, seed=i) for i, size in enumerate(streaming.EMA_SIZES)]
    sources = [streaming.randn(size, seed=50 + i) for i, size in enumerate(streaming.EMA_SIZES)]
    expected = [[t.clone() for t in targets], [s.clone() for s in sources]]
    streaming.check_ema(targets, sources, momentum)
    if momentum in (0, 1):  # exactly the one or the other
        assert all(map(torch.equal, targets, expected[int(1 - momentum)]))


@pytest.mark.parametrize("offset", [0, 1])
def test_writes_nothing_else(offset):
    streaming.check_ema_in_one_buffer(torch.float32, torch.float32, "cpu", offset)


def test_equal_tensors_stay_equal():
    target = streaming.randn(5000)
    source = target.clone()
    for momentum in (0.2, 0.9, 0.999, 1 - 1e-7):
        ema.update_([target], [source], momentum=momentum)
        assert torch.equal(target, source)


def test_momentum_close_to_one_still_moves():
    target, source = torch.zeros(20), torch.full((20,), 3.0)
    for _ in range(10):
        ema.update_([target], [source], momentum=1 - 1e-9)
    assert torch.allclose(target, torch.full((20,), 3e-8), rtol=1e-6)


def test_mixed_dtypes_take_one_launch_each(monkeypatch):
    kinds = [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
    ]
    sizes = (33, 4100, 5)
    targets = [streaming.randn(n, seed=i, dtype=t) for i, n in enumerate(sizes) for t, _ in kinds]
    sources = [
        streaming.randn(n, seed=9 + i, dtype=s) for i, n in enumerate(sizes) for _, s in kinds
    ]
    launches = count_launches(monkeypatch)
    truth = streaming.ema_truth(targets, sources, 0.9)
    ema.update_(targets, sources, momentum=0.9)
    assert len(launches) == 3
    for target, true in zip(targets, truth):
        streaming.assert_near(target, true, 1e-6)


def test_table_follows_the_tensors():
    """Other tensors at the same addresses, and the same tensors with other contents."""
    buffer, source = streaming.randn(9000), streaming.randn(9000, seed=1)
    streaming.check_ema([buffer], [source], 0.9)
    streaming.check_ema([buffer], [source], 0.9)
    pieces, sources = [buffer[:5000], buffer[6000:7000]], [source[:5000], source[6000:7000]]
    between, tail = buffer[5000:6000].clone(), buffer[7000:].clone()
    streaming.check_ema(pieces, sources, 0.9)
    assert torch.equal(buffer[5000:6000], between) and torch.equal(buffer[7000:], tail)
    half = buffer.view(torch.float16)
    half.copy_(streaming.randn(18000))
    streaming.check_ema([half[:5000], half[12000:13000]], sources, 0.9)


def test_channels_last():
    target, source = streaming.randn(4, 3, 5, 5), streaming.randn(4, 3, 5, 5, seed=1)
    target = target.to(memory_format=torch.channels_last)
    source = source.to(memory_format=torch.channels_last)
    streaming.check_ema([target], [source], 0.9)
    with pytest.raises(AssertionError):
        ema.update_([target], [source.contiguous()], momentum=0.9)


def test_a_target_given_twice_is_refused():
    target, source = streaming.randn(10), streaming.randn(10, seed=1)
    with pytest.raises(AssertionError, match="twice"):
        ema.update_([target, target], [source, source], momentum=0.9)


def test_empty_list():
    ema.update_([], [], momentum=0.9)
    ema.update_([torch.empty(0)], [torch.empty(0)], momentum=0.9)


def test_tables_are_not_kept_for_ever():
    for size in range(1, ema.KEPT_LISTS + 10):
        ema.update_([torch.zeros(size)], [torch.zeros(size)], momentum=0.9)
    assert len(ema._groups) == ema.KEPT_LISTS


def test_golden_moco_dino_byol():
    streaming.check_ema_golden("cpu")
