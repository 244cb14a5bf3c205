"""Heads, split batch norm, queue and prototypes: against golden files and their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastcl.nn import (
    FeatureQueue,
    MemoryBank,
    Prototypes,
    SplitBatchNorm,
    moco_head,
    moco_v2_head,
    momentum_copy,
    simclr_head,
    split_batch_norm,
    swav_head,
)

GOLDEN = Path(__file__).parent / "golden"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def close(tensor, truth, dtype, slack=1.0):
    rtol = slack * (1e-10 if dtype == torch.float64 else 3e-6)
    np.testing.assert_allclose(
        tensor.detach().numpy(), truth, rtol=0, atol=rtol * max(np.abs(truth).max(), 1e-3)
    )


@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["moco_splitbn_n12_c5_s4", "moco_splitbn_n6_c7_s2"])
def test_split_batch_norm_follows_the_official_demo(name, layout, dtype):
    data = np.load(GOLDEN / f"{name}.npz")
    x = torch.tensor(data["x"], dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(True)
    norm = SplitBatchNorm(x.shape[1], int(data["param_splits"])).to(dtype)
    norm.load_state_dict(
        {"weight": torch.tensor(data["weight"]), "bias": torch.tensor(data["bias"])}, strict=False
    )
    y = norm(x)
    y.backward(torch.tensor(data["dy"], dtype=dtype))
    close(y, data["f64_y"], dtype)
    close(x.grad, data["f64_grad_x"], dtype)
    close(norm.weight.grad, data["f64_grad_weight"], dtype)
    close(norm.bias.grad, data["f64_grad_bias"], dtype)
    close(norm.running_mean, data["f64_running_mean"], dtype)
    close(norm.running_var, data["f64_running_var"], dtype)
    assert norm.num_batches_tracked.item() == 1


def test_split_batch_norm_evaluates_as_plain_batch_norm():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    plain(torch.randn(8, 3, 6, 6))
    split = split_batch_norm(momentum_copy(plain), 2)
    assert isinstance(split[1], SplitBatchNorm)
    assert split.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, 3, 6, 6)
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_split_batch_norm_says_what_the_batch_must_be():
    with pytest.raises(ValueError, match=r"multiple of splits \(4\); got 6"):
        SplitBatchNorm(3, 4)(torch.zeros(6, 3, 2, 2))


@DTYPES
def test_simclr_head_follows_the_official_code(dtype):
    data = np.load(GOLDEN / "simclr_projhead2_b10_in24_out16.npz")
    head = simclr_head(24, 16).to(dtype)
    first, norm, _, last, last_norm = head
    with torch.no_grad():
        for parameter, name in ((first.weight, "W0"), (last.weight, "W1")):
            parameter.copy_(torch.tensor(data[name]).T)  # TensorFlow's matrices are (in, out)
        for parameter, name in (
            (norm.weight, "gamma0"),
            (norm.bias, "beta0"),
            (last_norm.weight, "gamma1"),
        ):
            parameter.copy_(torch.tensor(data[name]))
    x = torch.tensor(data["x"], dtype=dtype, requires_grad=True)
    out = head(x)
    out.backward(torch.tensor(data["dy"], dtype=dtype))
    close(out, data["f64_out"], dtype)
    close(x.grad, data["f64_grad_x"], dtype)
    close(first.weight.grad, data["f64_grad_W0"].T, dtype)
    close(last.weight.grad, data["f64_grad_W1"].T, dtype)
    close(norm.weight.grad, data["f64_grad_gamma0"], dtype)
    close(norm.bias.grad, data["f64_grad_beta0"], dtype)
    close(last_norm.weight.grad, data["f64_grad_gamma1"], dtype)
    close(norm.running_mean, data["f64_running_mean0"], dtype)
    # PyTorch's running variance is the unbiased one, TensorFlow's the biased.
    unbiased = 0.9 + (data["f64_running_var0"] - 0.9) * 10 / 9
    close(norm.running_var, unbiased, dtype)
    assert last_norm.bias.grad is None and not last_norm.bias.any()


def test_simclr_head_starts_small():
    torch.manual_seed(0)
    assert simclr_head(512, 128)[0].weight.std().item() == pytest.approx(0.01, rel=0.02)


def layers(head):
    return [
        (type(m).__name__, m.bias is not None, tuple(m.weight.shape))
        for m in head.modules()
        if isinstance(m, torch.nn.Linear | torch.nn.BatchNorm1d)
    ]


def test_heads_have_the_published_layers():
    assert layers(moco_head(20, 8)) == [("Linear", True, (8, 20))]
    assert layers(moco_v2_head(20, 8)) == [("Linear", True, (20, 20)), ("Linear", True, (8, 20))]
    assert layers(swav_head(20, 30, 8)) == [
        ("Linear", True, (30, 20)),
        ("BatchNorm1d", True, (30,)),
        ("Linear", True, (8, 30)),
    ]
    assert [name for name, _, _ in layers(simclr_head(20, 8, layers=3))] == [
        "Linear",
        "BatchNorm1d",
    ] * 3


def test_feature_queue_starts_on_the_sphere_and_wraps_around():
    queue = FeatureQueue(5, 3)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(5))
    rows = torch.arange(24.0).view(8, 3)
    for start in (0, 2, 4, 6):
        queue.push(rows[start : start + 2])
    assert queue.pointer.item() == 8 % 5
    # Slots 0..4 were last written by rows 5, 6, 7, 3, 4.
    assert torch.equal(queue.features, rows[[5, 6, 7, 3, 4]])
    assert set(queue.state_dict()) == {"features", "pointer"}


def test_prototypes_are_unit_after_normalize_and_score_by_inner_product():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 9)
    raw = prototypes.weight.detach().clone()
    prototypes.normalize_()
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(prototypes.weight * raw.norm(dim=1, keepdim=True), raw)
    z = torch.randn(4, 6)
    torch.testing.assert_close(prototypes(z), z @ prototypes.weight.T)


def test_momentum_copy_is_equal_separate_and_without_gradient():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    twin = momentum_copy(module)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        module[0].weight.zero_()
    assert twin[0].weight.abs().sum() > 0
    assert not any(p.requires_grad for p in twin.parameters())


def test_memory_bank_keeps_a_moving_average_on_the_sphere():
    torch.manual_seed(0)
    bank = MemoryBank(9, 4, momentum=0.25)
    assert list(bank.state_dict()) == ["features"]
    before = bank.features.clone()
    x = torch.nn.functional.normalize(torch.randn(3, 4), dim=1).requires_grad_(True)
    bank.update(torch.tensor([5, 2, 5]), x)
    for row, feature in ((2, x[1]), (5, x[2])):  # of equal rows the last, from the old row
        expected = torch.nn.functional.normalize(0.25 * before[row] + 0.75 * feature, dim=0)
        torch.testing.assert_close(bank.features[row], expected.detach())
    rest = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(bank.features[rest], before[rest]) and not bank.features.requires_grad


@pytest.mark.parametrize("size, dim", [(0, 4), (4, 0)])
def test_memory_bank_refuses_to_be_empty(size, dim):
    with pytest.raises(ValueError, match="at least 1; got"):
        MemoryBank(size, dim)
