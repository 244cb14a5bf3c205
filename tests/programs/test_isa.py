"""Every instruction set that this machine runs computes the same formulas.

One process per instruction set (FASTCL_ISA), which runs the checks below on the C++ kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl.functional as F
from fastcl import _C
from fastcl.ops import OPS
from fastcl.reference import sinkhorn as reference_sinkhorn
from fastcl.testing import relative_error, sample_inputs

HALVES = (torch.float16, torch.bfloat16)


def isas() -> list[str]:
    if _C.kernels is None:
        return []
    return [isa for isa in _C.kernels.supported_isas() if isa in _C.build_record()["isas"]]


@pytest.mark.skipif(_C.kernels is None, reason=_C.MISSING)
@pytest.mark.parametrize("isa", isas())
def test_instruction_set(isa: str) -> None:
    environment = os.environ | {"FASTCL_ISA": isa, "FASTCL_BACKEND": "cpp", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__, isa], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [isa, *(name for name, _ in CHECKS)]


@pytest.mark.skipif(_C.kernels is None, reason=_C.MISSING)
def test_unknown_instruction_set_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fastcl._C"],
        env=os.environ | {"FASTCL_ISA": "mmx", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FASTCL_ISA=mmx: this machine runs baseline" in done.stderr


# ---- what each process checks --------------------------------------------------------------------


def check_conversions_from_half() -> None:
    """Every bit pattern of a half format, as float32 and as the other; also in a vector's end."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).repeat(2)[: 2**16 + 5]
    for of in HALVES:
        for into in (torch.float32, *HALVES):
            assert_pushed_as_torch_casts(bits.view(of), into)


def check_conversions_to_half() -> None:
    """Random bit patterns of float32, every half, and the points midway, where ties go to even."""
    generator = torch.Generator().manual_seed(0)
    low, high = -(2**31), 2**31
    random = torch.randint(low, high, (200_003,), generator=generator, dtype=torch.int64)
    assert_pushed_as_torch_casts(random.to(torch.int32).view(torch.float32), *HALVES)
    for half in HALVES:
        exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(half).float()
        between = exact.nan_to_num(0, 0, 0)
        between = (between + torch.cat([between[1:], between[:1]])) / 2
        around = [torch.nextafter(between, torch.tensor(x)) for x in (-torch.inf, torch.inf)]
        assert_pushed_as_torch_casts(torch.cat([exact, between, *around]), half)


def assert_pushed_as_torch_casts(keys: torch.Tensor, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        queue, pointer = torch.zeros(1, len(keys), dtype=dtype), torch.zeros(1, dtype=torch.int64)
        F.queue_push_(queue, pointer, keys[None])
        expected, actual = keys.to(dtype), queue[0]
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        integer = torch.int16 if dtype in HALVES else torch.int32
        assert torch.equal(actual[~nan].view(integer), expected[~nan].view(integer)), dtype


def check_rows_of_subnormal_halves() -> None:
    """float16 below 6e-5 has a value in kernels whose own tiny results are zero."""
    generator = torch.Generator().manual_seed(0)
    x, y = (2e-5 * torch.randn(2, 40, 37, generator=generator)).half()
    for loss in (F.nt_xent, F.info_nce, F.dcl):
        assert relative_error(loss(x, y), loss(x.double(), y.double())) < 1e-5


def check_exponential() -> None:
    """p = e^x / (1 + e^x), from 1 down to where float32 ends, in a cross entropy's gradient."""
    x = torch.linspace(-103, 0, 20_001)
    logits = torch.stack([torch.zeros_like(x), x], 1).requires_grad_()
    F.soft_cross_entropy(
        logits, torch.tensor([[1.0, 0.0]]).expand(len(x), 2), reduction="sum"
    ).backward()
    truth = torch.sigmoid(x.double())
    p = logits.grad[:, 1].double()
    # One rounding of x log2 e, 2^-18 at its largest, is most of it.
    error = (p - truth).abs() / truth
    normal = truth > 2 * torch.finfo(torch.float32).tiny
    assert error[normal].max() < 1e-5
    assert (p[~normal] <= 3 * torch.finfo(torch.float32).tiny).all()
    near = x > -1  # no large x whose rounding hides the polynomial's own error
    assert error[near].max() < 3e-7


def check_offsets_of_logits() -> None:
    """An offset of 1e5 costs no digits: x t − max is rounded once, also without fma."""
    generator = torch.Generator().manual_seed(0)
    shape = 5, 83
    logits = (1e5 + torch.randn(shape, generator=generator)).requires_grad_()
    targets = torch.randn(shape, generator=generator).softmax(1)
    loss = F.soft_cross_entropy(logits, targets, temperature=0.7, reduction="sum")
    loss.backward()
    x, y = logits.detach().double().requires_grad_(), targets.double()
    truth = -(y * (x / 0.7).log_softmax(1)).sum()
    truth.backward()
    assert relative_error(loss.detach(), truth.detach()) < 2e-6
    assert relative_error(logits.grad, x.grad) < 1e-5


def check_sinkhorn_of_large_scores() -> None:
    for dtype in (torch.float32, *HALVES):
        scores = (50 * torch.randn(37, 83, generator=torch.Generator().manual_seed(0))).to(dtype)
        codes = F.sinkhorn(scores)
        truth = reference_sinkhorn.sinkhorn(scores.double(), epsilon=0.05, iterations=3)
        assert relative_error(codes, truth) < 1e-6


def check_every_operation() -> None:
    """All of OPS on the samples, and on sizes with whole vectors and ends, against float64."""
    for word, operations in OPS.items():
        for dtype in (torch.float32, *HALVES):
            for arguments in sample_inputs(word, dtype=dtype):
                compare(word, operations[0], [repeated(x) for x in arguments], dtype)


def repeated(x: object) -> object:
    """A tensor with its rows and columns repeated, so that it fills vectors; others as they are."""
    if isinstance(x, list):
        return [repeated(y) for y in x]
    if not isinstance(x, torch.Tensor) or x.ndim == 0 or x.dtype == torch.int64:
        return x
    generator = torch.Generator().manual_seed(x.numel())
    big = x.detach().repeat(*[1] * (x.ndim > 1), *[9] * max(x.ndim - 1, 1))
    noise = 1 + 0.1 * torch.rand(big.shape, generator=generator)
    return (big * noise).to(x.dtype).requires_grad_(x.requires_grad)


def compare(word: str, operation, arguments: list, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    results = []
    for double in (False, True):
        inputs = [leaf(x, double) for x in arguments]
        outputs = operation(*inputs)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        changed = [y for x in inputs for y in (x if isinstance(x, list) else [x])]
        if all(y is None for y in outputs):  # in place
            results.append([y for y in changed if isinstance(y, torch.Tensor)])
            continue
        leaves = [y for y in inputs if isinstance(y, torch.Tensor) and y.requires_grad]
        total = sum(y.double().cos().sum() for y in outputs if y is not None and y.requires_grad)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
        # What a differentiable operation saves for its backward is the backend's own.
        meant = [y for y in outputs if y is not None]
        meant = [y for y in meant if y.requires_grad] or meant
        results.append([*meant, *(y for y in gradients if y is not None)])
    # A sum of a few hundred terms, rounded to the dtype once and for gradients to the leaf's.
    allowed = 5e-5 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    for actual, truth in zip(*results):
        truth = truth.detach().double()
        assert torch.equal(actual.isfinite(), truth.isfinite()), word
        finite = truth.isfinite()
        if finite.any():
            error = relative_error(actual.detach()[finite], truth[finite])
            assert error < allowed, (word, dtype, error)


def leaf(x: object, double: bool) -> object:
    if isinstance(x, list):
        return [leaf(y, double) for y in x]
    if not isinstance(x, torch.Tensor):
        return x
    y = x.detach().clone()
    if double and y.is_floating_point():
        y = y.double()
    return y.requires_grad_(x.requires_grad)


CHECKS = [
    ("conversions_from_half", check_conversions_from_half),
    ("conversions_to_half", check_conversions_to_half),
    ("subnormal_halves", check_rows_of_subnormal_halves),
    ("exponential", check_exponential),
    ("offsets", check_offsets_of_logits),
    ("sinkhorn", check_sinkhorn_of_large_scores),
    ("operations", check_every_operation),
]

if __name__ == "__main__":
    assert sys.argv[1] == _C.ISA
    print(_C.ISA)
    for name, check in CHECKS:
        check()
        print(name)
