"""fastcl.compat.lightly against lightly: values, gradients, state and errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastcl.compat import _lightly_bank
from fastcl.compat import lightly as ours

pytest.importorskip("lightly")
from lightly import loss as theirs
from lightly.loss.dcl_loss import negative_mises_fisher_weights
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import update_momentum

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [(1, 3), (2, 1), (7, 33), (64, 16)]

# ---- NTXentLoss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0, -1.0])
@pytest.mark.parametrize("n, d", SIZES)
def test_ntxent_in_batch(compare, draw, n, d, temperature, dtype):
    pair = compare(theirs.NTXentLoss(temperature), ours.NTXentLoss(temperature), dtype)
    for scale in (1.0, 1e-3, 50.0):
        pair.step(lambda loss, x, y: loss(x, y), (scale * draw(n, d), draw(n, d)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 1.0, -0.5])
@pytest.mark.parametrize("n, d, size", [(5, 8, 16), (4, 8, 12), (1, 3, 2), (9, 4, 7), (16, 33, 16)])
def test_ntxent_memory_bank_over_steps(compare, draw, n, d, size, temperature, dtype):
    """Which rows a batch overwrites, drops, and finds: also n = size, n > size and the wrap."""
    args = (temperature, (size, d))
    pair = compare(theirs.NTXentLoss(*args).to(dtype), ours.NTXentLoss(*args).to(dtype), dtype)
    for _ in range(7):
        pair.step(lambda loss, x, y: loss(x, y), (draw(n, d), draw(n, d)))
    assert "memory_bank.bank" not in pair.ours.state_dict()


@pytest.mark.parametrize("needs", [(False, False), (False, True), (True, False)])
def test_ntxent_bank_is_written_only_if_out0_needs_a_gradient(compare, draw, needs):
    args = (0.2, (12, 8))
    pair = compare(theirs.NTXentLoss(*args), ours.NTXentLoss(*args), torch.float32)
    before = pair.ours.memory_bank.bank.clone()
    pair.step(lambda loss, x, y: loss(x, y), (draw(5, 8), draw(5, 8)), needs=needs)
    assert pair.ours.memory_bank.bank.equal(before) == (not needs[0])


def test_ntxent_bank_that_is_not_normalised(compare, draw):
    """The bank is used as it is, whatever was written into it."""
    args = (0.3, (12, 8))
    reference = theirs.NTXentLoss(*args)
    reference.memory_bank.bank.mul_(torch.linspace(0.1, 4, 12)[:, None])
    pair = compare(reference, ours.NTXentLoss(*args), torch.float32)
    for _ in range(3):
        pair.step(lambda loss, x, y: loss(x, y), (draw(5, 8), draw(5, 8)))


def test_ntxent_two_backward_passes_with_one_bank(draw):
    """The first loss's gradient is right although its batch has already been written."""
    losses = [module.NTXentLoss(0.1, (10, 4)) for module in (theirs, ours)]
    losses[1].memory_bank.bank.copy_(losses[0].memory_bank.bank)
    gradients = []
    torch.manual_seed(0)
    batches = torch.randn(2, 2, 6, 4)
    for loss in losses:
        x = batches.clone().requires_grad_()
        (loss(*x[0]) + 2 * loss(*x[1])).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_ntxent_bank_and_half_precision_inputs(draw):
    """lightly raises here; a float32 bank takes them, and the result is near float32's."""
    loss = ours.NTXentLoss(0.2, (12, 8))
    x, y = draw(5, 8).bfloat16().requires_grad_(), draw(5, 8).bfloat16()
    expected = copy.deepcopy(loss)(x.float().detach(), y.float())
    result = loss(x, y)
    assert result.dtype == torch.bfloat16 and loss.memory_bank.bank.dtype == torch.float32
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=0)


def test_ntxent_learned_temperature(draw):
    losses = [theirs.NTXentLoss(), ours.NTXentLoss()]
    gradients = []
    for loss in losses:
        loss.temperature = torch.tensor(0.3, requires_grad=True)
        torch.manual_seed(0)
        loss(torch.randn(6, 4), torch.randn(6, 4)).backward()
        gradients.append(loss.temperature.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, arguments",
    [("NTXentLoss", (0.5,)), ("NTXentLoss", (0.5, (12, 16))), ("DCLLoss", (0.5,)),
     ("NegativeCosineSimilarity", ()), ("SwaVLoss", ()), ("DINOLoss", (16,))],
)  # fmt: skip
def test_dtype_under_autocast(draw, name, arguments, dtype):
    x, y = draw(8, 16).to(dtype), draw(8, 16).to(dtype)
    losses = [getattr(m, name)(*arguments) for m in (theirs, ours)]
    if dtype == torch.float64:  # lightly's bank must be of that dtype then
        losses = [f.double() for f in losses]
    for target, source in zip(losses[1].buffers(), losses[0].buffers()):
        target.copy_(source)
    with torch.autocast("cpu", torch.bfloat16):
        lists = name in ("SwaVLoss", "DINOLoss")
        expected, result = (f([x], [x, y]) if lists else f(x, y) for f in losses)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result.double(), expected.double(), rtol=2e-2, atol=2e-3)


def test_ntxent_gather_without_processes_is_local(compare, draw):
    args = (0.2, (12, 8), True)
    pair = compare(theirs.NTXentLoss(*args), ours.NTXentLoss(*args), torch.float32)
    pair.step(lambda loss, x, y: loss(x, y), (draw(5, 8), draw(5, 8)))
    pair = compare(theirs.NTXentLoss(0.2, 0, True), ours.NTXentLoss(0.2, 0, True), torch.float32)
    pair.step(lambda loss, x, y: loss(x, y), (draw(5, 8), draw(5, 8)))


def test_ntxent_attributes_and_pickle(draw):
    loss = ours.NTXentLoss(0.2, (12, 8))
    reference = theirs.NTXentLoss(0.2, (12, 8))
    assert set(vars(reference)) <= set(vars(loss))
    assert loss.memory_bank.size == reference.memory_bank.size
    again = pickle.loads(pickle.dumps(loss))
    x, y = draw(5, 8).float(), draw(5, 8).float()
    assert again(x, y) == loss(x, y)


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize(
    "shapes", [((3, 4), (5, 4)), ((3, 4), (3, 5)), ((3,), (3,)), ((3, 4, 2), (3, 4, 2))]
)
@pytest.mark.parametrize("bank", [0, (6, 4)])
def test_ntxent_errors_are_lightlys(shapes, bank):
    errors = []
    for module in (theirs, ours):
        with pytest.raises(Exception) as caught:
            module.NTXentLoss(0.2, bank)(*(torch.randn(s) for s in shapes))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0,),
        (1e-9,),
        (-1e-9,),
        (0.5, -1),
        (0.5, (4, -1)),
        (0.5, 64),
        (0.5, (1, 2, 3)),
        (0.5, (3,)),
    ],
)
@pytest.mark.filterwarnings("ignore:Memory bank size")
def test_ntxent_wrong_arguments(arguments):
    """lightly 1.5 takes some that 1.6 does not."""
    errors = []
    for module in (theirs, ours):
        try:
            module.NTXentLoss(*arguments)
            errors.append(None)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "SwaVLoss"])
def test_gather_needs_torch_distributed(monkeypatch, name):
    argument = "sinkhorn_gather_distributed" if name == "SwaVLoss" else "gather_distributed"
    calls = []
    monkeypatch.setattr(torch.distributed, "is_available", lambda: calls.append(1) or True)
    getattr(ours, name)(**{argument: True})
    assert len(calls) == 1
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch\.distributed is not available"):
        getattr(ours, name)(**{argument: True})


# ---- MemoryBankModule ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("size", [5, 6, 9])
def test_memory_bank_over_steps(draw, size, first):
    banks = [
        cls((size, 2), feature_dim_first=first) for cls in (MemoryBankModule, ours.MemoryBankModule)
    ]
    banks[1].bank.copy_(banks[0].bank)
    for step in range(12):
        batch = draw(1 + step % 4, 2).float()
        (_, expected), (same, result) = (bank(batch, update=step % 5 != 4) for bank in banks)
        assert same is batch
        assert result.shape == expected.shape and result.equal(expected)
        assert banks[1].bank.equal(banks[0].bank) and banks[1].bank_ptr.equal(banks[0].bank_ptr)
    kept = result.clone()
    banks[1](batch + 1, update=True)
    assert result.equal(kept), "what was returned is a copy"


def test_memory_bank_starts_on_the_unit_sphere_as_lightlys():
    torch.manual_seed(3)
    expected = MemoryBankModule((9, 4)).bank
    torch.manual_seed(3)
    assert ours.MemoryBankModule((9, 4)).bank.equal(expected)


def test_memory_bank_of_size_0_returns_none(draw):
    x = draw(3, 2)
    assert ours.MemoryBankModule(0)(x) == (x, None)


def test_memory_bank_of_lightly_1_5(monkeypatch, draw):
    """With 1.5 installed a bare number warns, and the first batch gives the dimension."""
    monkeypatch.setattr(_lightly_bank, "installed_version", lambda name: (1, 5, 26))
    with pytest.warns(UserWarning, match="'size=8' does not specify feature dimension"):
        loss = ours.NTXentLoss(0.2, 8)
    x, y = draw(3, 4).float(), draw(3, 4).float()
    loss(x.requires_grad_(), y).backward()
    assert loss.memory_bank.bank.shape == (8, 4) and int(loss.memory_bank.bank_ptr) == 3
    assert loss.memory_bank.bank[:3].allclose(nn.functional.normalize(y))
    with pytest.warns(UserWarning):
        assert ours.MemoryBankModule().size == (65536,)


# ---- DCLLoss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.07, 1.0, -0.5])
@pytest.mark.parametrize("n, d", SIZES[1:])
def test_dcl(compare, draw, n, d, temperature, dtype):
    def weights(x, y):  # not symmetric, with a gradient
        return ((x - 2 * y) ** 2).sum(1)

    for fn in (None, weights):
        pair = compare(theirs.DCLLoss(temperature, fn), ours.DCLLoss(temperature, fn), dtype)
        pair.step(lambda loss, x, y: loss(x, y), (draw(n, d), draw(n, d)))


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_dclw(compare, draw, sigma, dtype):
    pair = compare(theirs.DCLWLoss(0.2, sigma), ours.DCLWLoss(0.2, sigma), dtype)
    pair.step(lambda loss, x, y: loss(x, y), (draw(9, 6), draw(9, 6)))


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_weights_of_dclw(draw):
    x, y = draw(9, 6), draw(9, 6)
    expected = negative_mises_fisher_weights(x, y, 0.7)
    torch.testing.assert_close(ours.negative_mises_fisher_weights(x, y, 0.7), expected)


def test_dcl_of_a_single_image_is_minus_infinity(draw):
    x, y = draw(1, 3), draw(1, 3)
    assert theirs.DCLLoss()(x, y) == ours.DCLLoss()(x, y) == -float("inf")


# ---- update_momentum, and memory -----------------------------------------------------------------


@pytest.mark.parametrize("m", [0.0, 0.5, 0.999, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_update_momentum(m, dtype):
    def network():
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)

    torch.manual_seed(0)
    model, expected = network(), network()
    model[1].running_mean += 1
    result = copy.deepcopy(expected)
    for _ in range(3):
        update_momentum(model, expected, m)
        ours.update_momentum(model, result, m)
    torch.testing.assert_close(result.state_dict(), expected.state_dict())
    assert not result[1].running_mean.any(), "buffers are not averaged"


def test_update_momentum_of_different_models_is_lightlys_error():
    errors = []
    for function in (update_momentum, ours.update_momentum):
        with pytest.raises(RuntimeError) as caught:
            function(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
def test_no_matrix_is_made(largest, name):
    x, y = torch.randn(512, 4).requires_grad_(), torch.randn(512, 4)
    expected, result = (largest(lambda m=m: getattr(m, name)()(x, y)) for m in (theirs, ours))
    assert expected >= 512 * 512 and result <= 2 * 1024 * 4


def test_no_matrix_with_the_bank_is_made(largest):
    x, y = torch.randn(16, 4).requires_grad_(), torch.randn(16, 4)
    losses = [m.NTXentLoss(0.1, (4096, 4)) for m in (theirs, ours)]
    expected, result = (largest(lambda f=f: f(x, y)) for f in losses)
    assert expected >= 16 * 4096 and result <= 4096 * 4
