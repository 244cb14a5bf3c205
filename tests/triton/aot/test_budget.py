"""The gate itself: it must see what is wrong with kernels that are known to be wrong."""

from dataclasses import replace

import budget
import pytest
import torch
import triton
import triton.language as tl

from fastcl.kernels import configs, self_similarity_lse


@triton.jit
def textbook_dk(
    Q, K, LABEL, LSE, G, DK, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr
):
    """The key gradient as one writes it first: the positive is subtracted inside the loop."""
    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    k = tl.load(K + j[:, None] * D + d[None, :], mask=j[:, None] < M, other=0.0)
    dk = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        q = tl.load(Q + i[:, None] * D + d[None, :])
        lse = tl.load(LSE + i)
        g = tl.load(G + i)
        label = tl.load(LABEL + i)
        p = tl.exp2(tl.dot(k, tl.trans(q)) - lse[None, :])
        w = (p - tl.where(j[:, None] == label[None, :], 1.0, 0.0)) * g[None, :]
        dk = tl.dot(w.to(q.dtype), q, dk)
    tl.store(DK + j[:, None] * D + d[None, :], dk.to(DK.dtype.element_ty), mask=j[:, None] < M)


def report_of_textbook_dk(block, stages, target=90, dtype=torch.bfloat16):
    rows, vector = torch.empty(256, 128, dtype=dtype), torch.empty(256)
    label = torch.empty(256, dtype=torch.int64)
    with budget.compiling_for(target) as kernels:
        textbook_dk[(2,)](
            rows, rows, label, vector, vector, rows, 256, 256,
            BLOCK_N=block, BLOCK_M=block, D=128, num_warps=8, num_stages=stages,
        )  # fmt: skip
    return budget.examine(kernels[0])


def test_gate_sees_spills_and_serialised_wgmma():
    report = report_of_textbook_dk(block=128, stages=2)
    assert report.wgmma_serialised
    with pytest.raises(AssertionError, match="registers spill"):
        budget.assert_within_budget(report)
    with pytest.raises(AssertionError, match="serialized"):
        budget.assert_within_budget(replace(report, spill_bytes=0, stack_bytes=0))


def test_gate_sees_too_much_shared_memory():
    report = report_of_textbook_dk(block=64, stages=12, target=80)
    with pytest.raises(AssertionError, match="shared memory"):
        budget.assert_within_budget(report)


def test_gate_sees_a_loop_without_tensor_cores():
    report = report_of_textbook_dk(block=32, stages=1, dtype=torch.float32)
    with pytest.raises(AssertionError, match="no HGMMA in the main loop"):
        budget.assert_within_budget(report, tensor_cores=True)


def test_gate_sees_too_few_blocks():
    report = report_of_textbook_dk(block=64, stages=2, target=80)
    fit = report.blocks_per_multiprocessor
    budget.assert_within_budget(report, tensor_cores=True, blocks=fit)
    with pytest.raises(AssertionError, match="blocks fit"):
        budget.assert_within_budget(report, blocks=fit + 1)


def test_gate_sees_spills_in_amd_assembly():
    """Blocks that fit NVIDIA's registers; CDNA's compiler says what it spilled in the metadata."""
    z, vector = torch.zeros(4096, 128, dtype=torch.bfloat16), torch.zeros(4096)
    known_bad = dict(BLOCK_X=128, BLOCK_Y=64, num_warps=8, num_stages=2)
    with configs.override(similarity_gradient=known_bad):
        with budget.compiling_for("gfx942", lambda name: name == "gradient_kernel") as kernels:
            self_similarity_lse.backward(vector, z, torch.tensor(1.0), None, vector, normalize=True)
    report = budget.examine(kernels[0])
    assert report.spill_bytes > 0 and report.stack_bytes > 0
    assert any(name.startswith("scratch_") for name in report.whole)
    with pytest.raises(AssertionError, match="registers spill"):
        budget.assert_within_budget(report)
