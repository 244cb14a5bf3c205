"""Launch configurations: which blocks, warps and stages a kernel runs with, and where.

A row is keyed by (kernel, compute capability, bucket of D, bytes of an element) and holds what
the launch passes on: block sizes, num_warps, num_stages. Every row is compiled in
tests/triton/aot and must show no spills, shared memory within the card's limit, and tensor-core
instructions in the main loop. `measured` says whether a GPU has run it for speed: a row that has
only been compiled was chosen by its registers, its shared memory and its blocks per processor.

A capability without rows takes those of its vendor's newest older one that has no more shared
memory than it has itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
from triton import knobs

Row = dict[str, Any]
Target = int | str  # 90 for sm_90, "gfx942" for AMD
Table = dict[tuple[str, Target, int, int], Row]

LARGE = 1 << 30  # the bucket of every D above the others: the kernel goes through D in blocks


def _rows(kernel: str, arch: Target, size: int, columns: str, *values: tuple[int, ...]) -> Table:
    """Rows as a table: `columns` names what stands under each other in `values`, bucket first."""
    names = columns.split()[1:]
    return {
        (kernel, arch, bucket, size): {**dict(zip(names, rest)), "measured": False}
        for bucket, *rest in values
    }


LSE = "bucket BLOCK_N BLOCK_M BLOCK_D num_warps num_stages"
SUM = "bucket BLOCK_X BLOCK_Y BLOCK_D num_warps num_stages"
MEAN = "bucket BLOCK_X BLOCK_Y BLOCK_D BLOCK_V num_warps num_stages"
PRODUCT = "bucket BLOCK_X BLOCK_V BLOCK_Y num_warps num_stages"

# Forward: at least two blocks on a multiprocessor where they fit, because only another block's
# products overlap with a block's exponentials; then as many rows kept as that allows.
# Sums: the accumulator (BLOCK_X, BLOCK_D) and the scores (BLOCK_X, BLOCK_Y) share the registers.
# Rows longer than the last bucket of a kernel that sums, float32 above all, go by way of _panels.
# LARGE: tiles of products read both operands again for each block of D, from the L2 cache: as wide
# as registers allow.
# Rows named _ids serve the launches with ids, whose 64-bit vectors need registers of their own.
TABLE: Table = {}
for _arch in (80, 86):  # 86 has less shared memory: 99 KB are enough for these
    _warps = 4 if _arch == 80 else 8  # what does not spill on 120, either
    TABLE |= _rows(
        *("similarity_rows", _arch, 2, LSE),
        *((128, 128, 64, 128, 8, 2), (256, 64, 64, 256, 4, 2), (LARGE, 128, 64, 64, 8, 2)),
    )
    TABLE |= _rows(
        *("similarity_gradient", _arch, 2, SUM),
        *((128, 64, 64, 128, 4, 2), (256, 64, 32, 256, _warps, 2)),
    )
for _arch in (90, 100):
    TABLE |= _rows(
        *("similarity_rows", _arch, 2, LSE),
        *((128, 128, 64, 128, 8, 2), (256, 128, 64, 256, 8, 2), (LARGE, 128, 256, 64, 8, 2)),
    )
TABLE |= _rows(
    *("similarity_gradient", 90, 2, SUM),
    *((128, 64, 64, 128, 4, 2), (256, 128, 32, 256, 8, 2)),
)
TABLE |= _rows(
    *("similarity_gradient", 100, 2, SUM),
    *((128, 128, 64, 128, 8, 2), (256, 64, 32, 256, 4, 2)),
)
for _arch in (80, 86, 90, 100):
    _m = 128 if _arch == 90 else 64
    _large = (64, 64, 64, 4, 2) if _arch == 100 else (64, 128, 64, 8, 2)
    TABLE |= _rows(
        *("similarity_pairs", _arch, 2, LSE, (128, 64, _m, 128, 4, 2)),
        *((256, 64, 64, 256, 4, 2), (LARGE, *_large)),
    )
    _wide = (128, 64, 256, 8, 2) if _arch in (90, 100) else (64, 64, 256, 4, 2)
    TABLE |= _rows(
        *("similarity_rows_ids", _arch, 2, LSE),
        *((128, 128, 64, 128, 8, 2), (256, *_wide), (LARGE, 128, _m, 64, 8, 2)),
    )
    _warps = 8 if _arch == 100 else 4
    TABLE |= _rows(
        *("similarity_pairs_ids", _arch, 2, LSE, (128, 64, 64, 128, 4, 2)),
        *((256, 64, 64, 256, _warps, 2), (LARGE, 64, 64, 64, _warps, 2)),
    )
    TABLE |= _rows("similarity_gradient_ids", _arch, 2, SUM, (128, 64, 32, 128, 4, 2))
    # The squares on the diagonal: as small as the smallest tile of the pairs.
    TABLE |= _rows(
        *("similarity_diagonal", _arch, 2, LSE),
        *((128, 64, 64, 128, 4, 2), (256, 64, 64, 256, 4, 2), (LARGE, 64, 64, 64, 4, 2)),
    )
    # float32: exact products do not run on tensor cores, and an element takes twice the room. Where
    # there are one or three stages, two spill, there or on a GPU that takes the row.
    for _kernel in ("similarity_rows", "similarity_pairs", "similarity_diagonal"):
        _n, _warps = (32, 4 if _arch < 100 else 8) if _kernel == "similarity_pairs" else (64, 8)
        if _kernel == "similarity_rows":
            _stages = {86: 1, 90: 3}.get(_arch, 2)
        else:
            _stages = 1 if _arch < 90 or (_arch, _kernel) == (100, "similarity_diagonal") else 2
        TABLE |= _rows(_kernel, _arch, 4, LSE, (LARGE, _n, 64, 32, _warps, _stages))
    _stages = 1 if _arch == 86 else 2
    TABLE |= _rows("similarity_mean", _arch, 4, MEAN, (128, 32, 32, 32, 128, 4, _stages))
    TABLE |= _rows("similarity_mean_ids", _arch, 4, MEAN, (64, 32, 32, 32, 64, 8, 2))
TABLE |= {
    (key[0].replace("gradient", "mean"), *key[1:]): dict(row, BLOCK_V=row["BLOCK_D"])
    for key, row in TABLE.items()
    if key[0].startswith("similarity_gradient")
}
for _kernel, _like in (
    ("pair_sigmoid_loss", "similarity_rows"),
    ("pair_sigmoid_gradient", "similarity_gradient"),
    ("instance_spread_shares", "similarity_rows"),
    ("instance_spread_loss", "similarity_rows"),
    ("instance_spread_gradient", "similarity_gradient"),
):
    TABLE |= {(_kernel, *key[1:]): dict(row) for key, row in TABLE.items() if key[0] == _like}
# What these make of a score needs more registers than an exponential.
for _arch in (80, 86, 90, 100):
    for _kernel in ("pair_sigmoid_loss", "instance_spread_shares", "instance_spread_loss"):
        TABLE |= _rows(_kernel, _arch, 4, LSE, (LARGE, 64, 32, 32, 8, 1 if _arch == 86 else 2))
        if _arch in (90, 100):
            _m = 64 if _kernel == "instance_spread_loss" else 128
            TABLE |= _rows(_kernel, _arch, 2, LSE, (LARGE, 128, _m, 64, 8, 2))
        elif _kernel != "pair_sigmoid_loss":  # see below
            for _bucket in (128, 256):
                TABLE[_kernel, _arch, _bucket, 2]["maxnreg"] = 255
    _x = 128 if _arch == 100 else 64
    _warps = 4 if _arch == 90 else 8
    TABLE |= _rows("instance_spread_gradient", _arch, 2, SUM, (128, _x, 32, 128, _warps, 2))
    del TABLE["instance_spread_gradient", _arch, 256, 2]
for _arch in (80, 86):
    TABLE |= _rows(
        *("pair_sigmoid_gradient", _arch, 2, SUM),
        *((128, 64, 64 if _arch == 80 else 32, 128, 4, 2), (256, 64, 32, 256, 8, 2)),
    )

# Where little is live, ptxas would spill for the sake of one more block on a multiprocessor. Short
# rows and float32 say instead how many registers a thread has; AMD's compiler needs no such word.
# On sm_90 it serialises the wgmma of sums of short rows (C7513) unless loads are not pipelined;
# three blocks on a multiprocessor hide them.
for (_kernel, _where, _bucket, _size), _row in list(TABLE.items()):
    _sums = "gradient" in _kernel or "mean" in _kernel
    if _size == 2 and _bucket == 128:
        TABLE[_kernel, _where, 64, 2] = _row = dict(_row)
        if _where == 90 and _sums:
            _row["num_stages"] = 1
        elif _where == 90 and _kernel == "similarity_pairs":
            _row["BLOCK_M"] = 64  # 128 spill at D = 32
    elif _size == 2:
        continue
    if _where == 90:
        if _size == 4 and _kernel in ("pair_sigmoid_loss", "instance_spread_loss"):
            _row["maxnreg"] = 128
        continue
    if _where == 100 and _size == 4 and not _kernel.startswith("similarity"):
        _row["num_stages"] = 1  # loads kept in flight cost registers that there are not
    if _row["num_warps"] == 4 or (_size == 2 and not _kernel.startswith("similarity_rows")):
        _row["maxnreg"] = 255
    elif _size == 4 and _kernel != "similarity_rows":
        _row["maxnreg"] = 128

# All 255 registers are taken, and a second stage of loads spills 8 to 16 bytes of them.
TABLE["similarity_gradient", 90, 256, 2]["num_stages"] = 1
for _kernel in ("instance_spread_gradient", "pair_sigmoid_gradient"):
    TABLE[_kernel, 86, 128, 2]["maxnreg"] = 255  # raw rows spill 8 bytes for a block
TABLE["pair_sigmoid_gradient", 100, 128, 2]["BLOCK_Y"] = 32  # 64 spill up to 36 bytes

# Panels: a tile of weights is a product and its exponentials; what adds them up, a plain product.
for _arch in (80, 86, 90, 100):
    _d = 32 if _arch == 86 else 64
    _m = 64 if _arch == 100 else 128
    TABLE |= _rows("similarity_weights", _arch, 2, SUM, (LARGE, 128, _m, _d, 8, 3))
    TABLE |= _rows("pair_sigmoid_weights", _arch, 2, SUM, (LARGE, 128, 128, _d, 8, 3))
    TABLE |= _rows("instance_spread_weights", _arch, 2, SUM, (LARGE, _m, 64, _d, 8, 3))
    TABLE |= _rows("panel_sums", _arch, 2, PRODUCT, (LARGE, 128, 128, _d, 8, 3))
    for _kernel in ("similarity_weights", "pair_sigmoid_weights", "instance_spread_weights"):
        _n = 64 if _arch < 90 or _kernel.startswith("instance") else 128
        _stages = 1 if _arch == 80 else 2
        TABLE |= _rows(_kernel, _arch, 4, SUM, (LARGE, _n, 64, 32, 8, _stages))
        TABLE[_kernel, _arch, LARGE, 4]["maxnreg"] = 128
    TABLE |= _rows("panel_sums", _arch, 4, PRODUCT, (LARGE, 128, 128, 32, 8, 2))

# CDNA 3: four waves may have all 512 registers of a lane where eight have half of them. Two blocks
# on a compute unit.
for _kernel in ("similarity_gradient", "pair_sigmoid_gradient"):
    TABLE |= _rows(_kernel, "gfx942", 2, SUM, (128, 64, 64, 128, 4, 1))
TABLE |= _rows("similarity_mean", "gfx942", 2, MEAN, (128, 64, 64, 128, 128, 4, 1))
TABLE |= _rows("instance_spread_gradient", "gfx942", 2, SUM, (128, 64, 32, 128, 4, 1))

# Bytes of shared memory that one block may ask for.
SHARED_MEMORY: dict[Target, int] = {
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    121: 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx950": 163840,
}

INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1 when triton was imported
INTERPRETED_AS: Target = 90  # whose rows the interpreter takes

_overrides: dict[str, Row] = {}


@contextlib.contextmanager
def override(**rows: Row) -> Iterator[None]:
    """Replaces entries of the rows of the kernels named, for tests and tuning.

    `with override(similarity_rows=dict(BLOCK_M=16, BLOCK_N=32)): ...`
    """
    saved = dict(_overrides)
    _overrides.update(rows)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(saved)


@lru_cache(maxsize=64)
def _device_facts(device: torch.device) -> tuple[Target, int]:
    properties = torch.cuda.get_device_properties(device)
    count = int(properties.multi_processor_count)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0], count
    return properties.major * 10 + properties.minor, count


def target(tensor: torch.Tensor) -> Target:
    """The compute capability (90 for sm_90) or AMD architecture that the tensor lies on."""
    return INTERPRETED_AS if INTERPRETED else _device_facts(tensor.device)[0]


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many multiprocessors the tensor's device has; the interpreter says 4."""
    return 4 if INTERPRETED else _device_facts(tensor.device)[1]


def input_precision(tensor: torch.Tensor) -> str:
    """What tl.dot may do to float32: exact products unless torch's own switch allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def assert_supported(*tensors: torch.Tensor) -> None:
    """Element types that the kernels compute correctly, here."""
    for tensor in tensors:
        assert tensor.dtype in (torch.float32, torch.float16, torch.bfloat16), tensor.dtype
        # Triton 3.8's interpreter multiplies the bit patterns of bfloat16 and reports nothing.
        assert not (INTERPRETED and tensor.dtype == torch.bfloat16), (
            "Triton's interpreter does not compute bfloat16 correctly; use float32 or float16"
        )


def pick(kernel: str, tensor: torch.Tensor, d: int = 0, *, ids: bool = False) -> Row:
    """The launch options of a kernel for tensor's device and element size, and for D features.

    ids: prefer the rows of kernel_ids where there are some.
    """
    where, size = target(tensor), tensor.element_size()
    chosen = f"{kernel}_ids" if ids and _in_table(f"{kernel}_ids", size) else kernel
    row = find(chosen, where, d, size) if _in_table(kernel, size) else {}
    row |= _overrides.get(kernel, {})
    assert row, f"no launch configuration for {kernel} with {size}-byte elements"
    unknown = {"measured"} if _is_nvidia(where) else {"measured", "maxnreg"}
    return {name: value for name, value in row.items() if name not in unknown}


def _in_table(kernel: str, element_size: int) -> bool:
    return any(key[0] == kernel and key[3] == element_size for key in TABLE)


def knows(kernel: str, tensor: torch.Tensor) -> bool:
    """Whether pick has a row of a kernel for tensor's element size."""
    return kernel in _overrides or _in_table(kernel, tensor.element_size())


def _is_nvidia(where: Target) -> bool:
    return isinstance(where, int) and not INTERPRETED


def registers(tensor: torch.Tensor, most: int) -> Row:
    """The launch option that gives a thread so many registers, where there is one."""
    return dict(maxnreg=most) if _is_nvidia(target(tensor)) else {}


def find(kernel: str, where: Target, d: int, element_size: int) -> Row:
    """The table's row: smallest bucket that holds d (else the largest), nearest capability."""
    return dict(TABLE[key_of(kernel, where, d, element_size)])


def key_of(kernel: str, where: Target, d: int, element_size: int) -> tuple[str, Target, int, int]:
    """The key of that row."""
    keys = [key for key in TABLE if key[0] == kernel and key[3] == element_size]
    assert keys, f"no launch configuration for {kernel} with {element_size}-byte elements"
    arch = _nearest({key[1] for key in keys}, where)
    buckets = sorted(key[2] for key in keys if key[1] == arch)
    bucket = next((b for b in buckets if b >= d), buckets[-1])
    return kernel, arch, bucket, element_size


def _nearest(archs: set[Target], where: Target) -> Target:
    if where in archs:
        return where
    limit = SHARED_MEMORY.get(where, 65536 if isinstance(where, str) else 101376)
    archs = {a for a in archs if isinstance(a, type(where))} or archs
    fitting = {a for a in archs if SHARED_MEMORY[a] <= limit}
    newer = {a for a in archs if isinstance(a, int) and isinstance(where, int) and a > where}
    older = fitting - newer
    # Nothing older fits: the row that asks for least.
    return max(older, key=_age) if older else min(archs, key=lambda a: SHARED_MEMORY[a])


def _age(arch: Target) -> tuple[int, str]:
    return (arch, "") if isinstance(arch, int) else (0, arch)


def block_of(d: int, largest: int) -> int:
    """The power of two that covers d, between 16 (what tl.dot needs) and largest."""
    return max(16, min(triton.next_power_of_2(d), largest))
