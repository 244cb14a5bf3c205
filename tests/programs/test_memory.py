"""Huge queues and banks: no copy of them, and half precision that stays half precision."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods import METHODS
from fastcl.nn import FeatureQueue, MemoryBank

ROOT = Path(__file__).parents[2]
ROWS = 400_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not say what a process had resident at most")
    folder = tmp_path_factory.mktemp("huge")
    command = [sys.executable, "tests/huge_memory.py", str(ROWS), str(folder)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_step_and_its_checkpoint_have_no_copy_of_the_memory(measured):
    for row in measured:
        banks = 2 if row["name"] == "cmc" else 1
        fp32 = ROWS * 128 * 4 * banks
        half = not {"bf16", "fp16"}.isdisjoint(map(str, row["options"].values()))
        assert row["held"] == pytest.approx(fp32 / 2 if half else fp32, rel=0.05)
        # Of the smallest, 102 MB of bfloat16, a copy would be seen in any of them.
        for what in {"construction", "step", "checkpoint", "restoring"} & row.keys():
            assert row[what] < 70e6, (what, row)
    assert len(measured) == 6 and sum("restoring" in row for row in measured) == 2


@pytest.mark.parametrize("rows", [1, 5, 16, 20, 33])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_keys_are_widened_part_by_part(rows, narrow, monkeypatch):
    """Every number of parts gives what widening all of them at once gives, gradients too."""
    monkeypatch.setattr("fastcl._functional._shared.WIDENED", 16)
    torch.manual_seed(rows)
    wide = [torch.randn(7, 12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(3.0, requires_grad=True)
    queue = torch.randn(rows, 12).to(narrow)
    weight = torch.randn(7)
    query, positive = (x.detach().float().requires_grad_() for x in wide)
    for normalized in (False, True):
        found = F.similarity_lse(query, queue, scale=scale, normalize=normalized)
        expected = F.similarity_lse(
            wide[0], queue.double(), scale=scale.double(), normalize=normalized
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(found @ weight, (query, scale))
        truth = torch.autograd.grad(expected @ weight.double(), (wide[0], scale))
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(F.info_nce(query, positive, queue), (query, positive))
    truth = torch.autograd.grad(F.info_nce(*wide, queue.double()), wide)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_keys_with_a_gradient_are_promoted_as_by_torch():
    query, key = torch.randn(3, 8), torch.randn(40, 8).bfloat16().requires_grad_()
    lse = F.similarity_lse(query, key)
    torch.testing.assert_close(lse, (query @ key.float().T).logsumexp(1))
    lse.sum().backward()
    assert key.grad is not None and key.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queue_and_bank_in_half_precision(dtype):
    queue, bank = FeatureQueue(9, 16, dtype=dtype), MemoryBank(9, 16, dtype=dtype)
    torch.testing.assert_close(queue.features.float().norm(dim=1), torch.ones(9), atol=2e-2, rtol=0)
    before, keys = bank.features.clone(), normalize(torch.randn(4, 16), dim=1)
    queue.push(keys)
    bank.update(torch.tensor([1, 3, 5, 7]), keys)
    assert torch.equal(queue.features[:4], keys.to(dtype))
    assert bank.features.dtype == dtype and torch.equal(bank.features[::2], before[::2])
    expected = normalize((before[1::2].float() + keys) / 2, dim=1)
    torch.testing.assert_close(bank.features[1::2].float(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("instdisc", "bank_dtype"),
        ("cmc", "bank_dtype"),
        ("moco-v1", "queue_dtype"),
        ("simclr-v2", "queue_dtype"),
    ],
)
def test_an_unknown_dtype_is_refused(method, option):
    config = replace(METHODS[method].recipes["quick"], **{option: "half"})
    with pytest.raises(ValueError, match=f"{option} must be fp32, bf16, fp16; got 'half'"):
        METHODS[method](METHODS[method].build_encoder(config, 24), config)
