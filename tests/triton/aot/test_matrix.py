"""Every shipped launch on every GPU: no spills, shared memory, tensor cores, no serialised wgmma.

Each file of kernels/ is launched as its host functions do, for rows of many lengths, every element
type, with and without ids and normalisation. `make test` takes some of them; `make aot`, which sets
FASTCL_AOT=full, takes all: thousands of kernels, an hour or more when none is in Triton's cache.
Its parts have a GPU, operation and element type: make aot ARGS="-k 120-similarity_lse-float16".
"""

import os

import budget
import pytest
import torch

from bench.compiled import TARGETS, compiling_for, examine
from bench.gpu_launches import LAUNCHES, NORMALIZED, PRODUCTS, Case, cases, is_product
from fastcl.kernels import configs

FULL = os.environ.get("FASTCL_AOT") == "full"
# Those of a block and above, and what the kernels pad or mask; 512 has one block of features in the
# widest sums, 1,024 and 2,048 several.
SIZES = (32, 64, 100, 128, 256, 300, 512, 1024, 2048)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STREAMING = [word for word in LAUNCHES if word not in NORMALIZED]
# Each GPU and each row of products comes by; of the streaming kernels only AMD's, as NVIDIA's have
# tests of their own.
QUICK = [
    (80, "similarity_lse", Case(300)),
    (80, "instance_spread", Case(256)),
    (86, "self_similarity_lse", Case(100, torch.float16)),
    (86, "pair_sigmoid", Case(64)),
    (89, "self_similarity_lse", Case(256)),
    (90, "similarity_lse", Case(512, ids=True)),
    (90, "similarity_lse", Case(256)),
    (90, "pair_sigmoid", Case(512)),
    (90, "instance_spread", Case(128)),
    (100, "similarity_lse", Case(512, torch.float16)),
    (100, "self_similarity_lse", Case(256)),
    (100, "pair_sigmoid", Case(64, torch.float32)),
    (120, "self_similarity_lse", Case(64)),
    ("gfx942", "similarity_lse", Case(100)),
    ("gfx942", "instance_spread", Case(300)),
    *(("gfx942", word, Case(128)) for word in STREAMING),
]
ALL = [(target, word, dtype) for target in TARGETS for word in LAUNCHES for dtype in DTYPES]


@pytest.mark.parametrize(
    "target, word, part",
    ALL if FULL else QUICK,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_launches_are_within_budget(target, word, part):
    """part: one case, or the element type of all of them."""
    only = None if FULL or word in STREAMING else {*PRODUCTS, "finish_kernel"}.__contains__
    seen, wrong = set(), []
    for each in [part] if isinstance(part, Case) else cases(word, SIZES, (part,)):
        with compiling_for(target, only) as launches:
            LAUNCHES[word](each)
        for launch in launches:
            if launch.kernel.hash in seen:
                continue
            seen.add(launch.kernel.hash)
            report = examine(launch)
            products = is_product(report.word, report.name) and each.dtype != torch.float32
            try:
                budget.assert_within_budget(report, tensor_cores=products)
            except AssertionError as error:
                wrong.append(f"{each}: {error}")
    print(f"{len(seen)} kernels of {word} for {target}, {part}")
    assert seen and not wrong, f"{len(wrong)} of {len(seen)} kernels:\n" + "\n".join(wrong)


def test_every_row_of_the_table_is_unmeasured_and_taken_by_some_launch():
    """A row that no launch takes would be proved by nothing."""
    assert all(row["measured"] is False for row in configs.TABLE.values())
    taken = set()
    original = configs.key_of

    def key_of(*asked):
        taken.add(original(*asked))
        return original(*asked)

    configs.key_of = key_of
    try:
        for target in TARGETS:
            with torch.device("meta"), compiling_for(target, only=lambda name: False):
                for word in NORMALIZED:
                    for case in cases(word, (64, 100, 256, 512), DTYPES):
                        LAUNCHES[word](case)
    finally:
        configs.key_of = original
    assert taken == set(configs.TABLE)
