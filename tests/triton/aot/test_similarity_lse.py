"""Every row of the similarity kernels' table, compiled for its GPU and within its budget.

A row is compiled as its host function launches it, with rows enough to fill the device and D that
fills the row's bucket, normalised, which takes most registers; the _ids rows with ids.
"""

import os

import budget
import pytest
import torch

from fastcl.kernels import configs, self_similarity_lse, similarity_lse

PROVED = (80, 90, 100)
MAIN = ("rows_kernel", "pairs_kernel", "gradient_kernel", "mean_kernel")
# Where the exponentials weigh most, another block must fit beside each to hide them.
SIDE_BY_SIDE = {("rows_kernel", 128): 2, ("pairs_kernel", 128): 2, ("gradient_kernel", 128): 1}


# All variants of every row take minutes; the one that needs most registers stands for its row.
FULL = os.environ.get("FASTCL_AOT") == "full"


def launches(arch, d, dtype, *, ids=False, normalize=True, full=FULL, n=16384):
    """What the host functions launch for n rows of d features."""
    z, vector = torch.zeros(n, d, dtype=dtype), torch.zeros(n)
    ids = torch.zeros(n, dtype=torch.int64) if ids else None
    pair = (z, z, torch.tensor(1.0), ids, ids)
    with budget.compiling_for(arch) as kernels:
        similarity_lse.forward(*pair, normalize=normalize, rows=True, columns=False)
        similarity_lse.forward_with_mean(*pair, normalize=normalize)
        self_similarity_lse.forward(z, pair[2], ids, normalize=normalize)
        self_similarity_lse.backward(vector, z, pair[2], ids, vector, normalize=normalize)
        if full:
            similarity_lse.forward(*pair, normalize=normalize, rows=True, columns=True)
            for rows, columns, key in [(vector, None, True), (vector, vector, False)]:
                similarity_lse.backward(
                    rows, columns, *pair, rows, columns,
                    normalize=normalize, need_query=True, need_key=key,
                )  # fmt: skip
    return kernels


def assert_all_within_budget(kernels, d, tensor_cores=True):
    seen = set()
    for compiled in kernels:
        report = budget.examine(compiled)
        main = report.name in MAIN
        budget.assert_within_budget(
            report,
            tensor_cores=main and tensor_cores,
            blocks=SIDE_BY_SIDE.get((report.name, d), 1) if tensor_cores else 1,
        )
        seen.add(report.name)
    assert seen >= set(MAIN) | {"finish_kernel"}


@pytest.mark.parametrize("d", [128, 256, 1024])
@pytest.mark.parametrize("arch", PROVED)
def test_bfloat16_is_within_budget(arch, d):
    assert_all_within_budget(launches(arch, d, torch.bfloat16), d)


@pytest.mark.parametrize("arch", PROVED if FULL else [90])
def test_bfloat16_with_ids_is_within_budget(arch):
    for d in [128, 256, 1024] if FULL else [128]:
        for normalize in [True, False] if FULL else [True]:
            kernels = launches(arch, d, torch.bfloat16, ids=True, normalize=normalize)
            assert_all_within_budget(kernels, 0)


@pytest.mark.parametrize("arch", PROVED if FULL else [90])
def test_float32_is_within_budget(arch):
    """Exact float32 products use no tensor cores."""
    assert_all_within_budget(launches(arch, 1024, torch.float32), 1024, tensor_cores=False)


@pytest.mark.skipif(not FULL, reason="a variant of rows proved above; FASTCL_AOT=full runs it")
@pytest.mark.parametrize("d", [128, 256, 1024])
@pytest.mark.parametrize("arch", PROVED)
def test_raw_rows_and_float16_are_within_budget(arch, d):
    assert_all_within_budget(launches(arch, d, torch.bfloat16, normalize=False), d)
    assert_all_within_budget(launches(arch, d, torch.float16), 0)


def test_every_row_is_unmeasured_and_fits_where_it_is_taken():
    """86 takes 80's blocks: what fits 80 with 99 KB to spare fits there (see the next test)."""
    rows = {key: row for key, row in configs.TABLE.items() if key[0].startswith("similarity")}
    assert len(rows) > 80
    assert all(row["measured"] is False for row in rows.values())
    for (kernel, arch, bucket, size), row in rows.items():
        if arch == 86:
            assert row == rows[kernel, 80, bucket, size]


@pytest.mark.skipif(not FULL, reason="the blocks of sm_80; FASTCL_AOT=full compiles them")
@pytest.mark.parametrize("arch, d", [(86, 256), (120, 128)])
def test_cards_with_little_shared_memory(arch, d):
    """86 by its own rows, 89 and 120 by falling back to them."""
    z = torch.zeros(16384, d, dtype=torch.bfloat16)
    vector, scale = torch.zeros(16384), torch.tensor(1.0)
    with budget.compiling_for(arch) as kernels:
        similarity_lse.forward(z, z, scale, None, None, normalize=True, rows=True, columns=True)
        self_similarity_lse.backward(vector, z, scale, None, vector, normalize=True)
    for compiled in kernels:
        report = budget.examine(compiled)
        budget.assert_within_budget(report, tensor_cores=report.name in MAIN)


def test_sizes_do_not_recompile():
    """Other N and M, odd and even, are served by the kernels compiled before."""
    with budget.compiling_for(90) as kernels:
        for n, m in [(4096, 8192), (4097, 8191), (1, 7)]:
            q, k = (
                torch.zeros(n, 128, dtype=torch.bfloat16),
                torch.zeros(m, 128, dtype=torch.bfloat16),
            )
            similarity_lse.forward(
                q, k, torch.tensor(1.0), None, None, normalize=True, rows=True, columns=True
            )
    compiled = {
        k.name: {other.kernel.hash for other in kernels if other.name == k.name} for k in kernels
    }
    assert len(compiled["pairs_kernel"]) == 1
    assert len(compiled["_factors_kernel"]) == 1
    assert len(compiled["finish_kernel"]) == 2  # for rows, for columns


def test_a_row_that_is_too_large_is_refused():
    """What the table avoids: the gate would stop it."""
    with configs.override(similarity_gradient=dict(BLOCK_X=128, BLOCK_Y=128, num_warps=4)):
        z, vector = torch.zeros(16384, 128, dtype=torch.bfloat16), torch.zeros(16384)
        with budget.compiling_for(90) as kernels:
            self_similarity_lse.backward(vector, z, torch.tensor(1.0), None, vector, normalize=True)
    report = next(r for r in map(budget.examine, kernels) if r.name == "gradient_kernel")
    with pytest.raises(AssertionError, match="registers spill"):
        budget.assert_within_budget(report, tensor_cores=True)
