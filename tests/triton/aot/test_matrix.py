"""Every shipped launch on every GPU: no spills, shared memory, tensor cores, no serialised wgmma.

Each file of kernels/ is launched as its host functions do, for rows of many lengths, every element
type, with and without ids and normalisation. `make test` takes one length for each GPU, chosen so
that all kernels and all rows of the table come by somewhere; FASTCL_AOT=full, which `make aot`
sets, takes all of them: some 4,000 kernels, half an hour.
"""

import os

import budget
import pytest
import torch

from bench.compiled import TARGETS, compiling_for, examine
from bench.gpu_launches import LAUNCHES, NORMALIZED, Case, cases, is_product
from fastcl.kernels import configs

FULL = os.environ.get("FASTCL_AOT") == "full"
# Those of a block and above, and what the kernels pad or mask; 512 has one block of features in the
# widest sums, 2,048 several.
SIZES = (32, 64, 100, 256, 300, 512, 2048)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One case for each GPU and operation of products, where any two GPUs differ in something.
QUICK = {
    80: Case(300, torch.bfloat16),
    86: Case(100, torch.float16),
    89: Case(256, torch.bfloat16),
    90: Case(512, torch.bfloat16, ids=True),
    100: Case(512, torch.float16),
    120: Case(64, torch.bfloat16),
    "gfx942": Case(100, torch.bfloat16),
}


def chosen(word, target):
    if FULL:
        return cases(word, SIZES, DTYPES)
    quick = QUICK[target]
    if word not in ("similarity_lse", "self_similarity_lse"):
        quick = Case(quick.d, quick.dtype)
    # The streaming kernels have tests of their own for NVIDIA's GPUs.
    return [quick] if word in NORMALIZED or isinstance(target, str) else []


def kernels_of(word, case, target):
    """What an operation launches, each kernel once."""
    with compiling_for(target) as launches:
        LAUNCHES[word](case)
    return list({launch.kernel.hash: launch for launch in launches}.values())


@pytest.mark.parametrize(
    "target, word",
    [(target, word) for target in TARGETS for word in LAUNCHES if chosen(word, target)],
)
def test_launches_are_within_budget(target, word):
    seen, wrong = set(), []
    for case in chosen(word, target):
        for launch in kernels_of(word, case, target):
            if launch.kernel.hash in seen:
                continue
            seen.add(launch.kernel.hash)
            report = examine(launch)
            products = is_product(report.word, report.name) and case.dtype != torch.float32
            try:
                budget.assert_within_budget(report, tensor_cores=products)
            except AssertionError as error:
                wrong.append(f"{case}: {error}")
    assert seen and not wrong, f"{len(wrong)} of {len(seen)} kernels:\n" + "\n".join(wrong)


def test_every_row_of_the_table_is_unmeasured_and_taken_by_some_launch():
    """A row that no launch takes would be proved by nothing."""
    assert all(row["measured"] is False for row in configs.TABLE.values())
    taken = set()
    original = configs.find

    def find(kernel, where, d, size):
        row = original(kernel, where, d, size)
        arch = configs._nearest(
            {a for k, a, _, s in configs.TABLE if (k, s) == (kernel, size)}, where
        )
        buckets = sorted(b for k, a, b, s in configs.TABLE if (k, a, s) == (kernel, arch, size))
        taken.add((kernel, arch, next((b for b in buckets if b >= d), buckets[-1]), size))
        return row

    configs.find = find
    try:
        for target in TARGETS:
            with compiling_for(target, only=lambda name: False):
                for word in NORMALIZED:
                    for case in cases(word, (128, 256, 512), (torch.bfloat16, torch.float32)):
                        LAUNCHES[word](case)
    finally:
        configs.find = original
    assert taken == set(configs.TABLE)
