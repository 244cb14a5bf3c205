"""Exponential moving average of a list of tensors, in one launch.

    target ← target + (1 − m)(source − target)          that is m·target + (1 − m)·source

Written so that a target equal to its source stays equal whatever the rounding of m. Computed in
float32; 1 − m is rounded once, from float64. Each element is read once from either list and written
once: n·(2 b_target + b_source) bytes.

One launch for each pair of element types in the list: programs find their piece of a tensor in a
table on the device. The table is built, and its copy waited for, once for a list of tensors; later
calls with the same tensors do not wait, and a CUDA graph can capture them.
Plain version: fastcl/reference/ema.py. CPU twin: csrc/ema.cpp.
Source: He et al. 2020, arXiv:1911.05722, eq. 2; Grill et al. 2020, arXiv:2006.07733.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs

# 16 elements a thread: in float32, four 128-bit loads in flight for each list.
BLOCK, NUM_WARPS = 4096, 8
KEPT_LISTS = 32  # lists of tensors whose tables stay on the device


@triton.jit
def _lerp(target_ptr, source_ptr, i, count, momentum, rest):
    t = tl.load(target_ptr + i, mask=i < count).to(tl.float32)
    s = tl.load(source_ptr + i, mask=i < count).to(tl.float32)
    # The smaller weight multiplies the difference: exact at m = 0 and at m = 1.
    new = tl.where(rest < 0.5, t + rest * (s - t), s - momentum * (s - t))
    tl.store(target_ptr + i, new.to(target_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def update_kernel(
    target_ptr,  # the first target: the others lie at distances from it, given in the table
    source_ptr,  # the first source, likewise
    table_ptr,  # (programs, 3) int64: distance of the target, of the source, number of elements
    momentum,
    rest,  # 1 − momentum
    TARGET_UNIT: tl.constexpr,  # elements in one unit of distance: 16 bytes where all is aligned
    SOURCE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + 3 * tl.program_id(0)
    target_ptr += tl.load(row) * TARGET_UNIT
    source_ptr += tl.load(row + 1) * SOURCE_UNIT
    count = tl.load(row + 2)
    # A mask of any length would split the loads into single elements: eights first, then the rest.
    eights = (count // 8) * 8
    _lerp(target_ptr, source_ptr, tl.arange(0, BLOCK), eights, momentum, rest)
    _lerp(target_ptr, source_ptr, eights + tl.arange(0, 8), count, momentum, rest)


class Group(NamedTuple):
    """Tensors of one pair of element types, and where their pieces lie."""

    first: int  # index in the list of the tensors that distances are counted from
    table: Tensor  # (programs, 3) int64 on the device
    target_unit: int
    source_unit: int


def _group(indices: list[int], targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Group:
    first = indices[0]
    sizes = targets[first].element_size(), sources[first].element_size()
    starts = [[tensors[i].data_ptr() for i in indices] for tensors in (targets, sources)]
    assert len(set(starts[0])) == len(indices), "a target appears twice in the list"
    aligned = all(address % 16 == 0 for addresses in starts for address in addresses)
    units = [16 // size if aligned else 1 for size in sizes]  # in elements
    pieces = []
    for i, *addresses in zip(indices, *starts):
        element = torch.arange(0, targets[i].numel(), BLOCK)  # the first of each piece
        distances = [
            (address - base[0] + element * size) // (unit * size)
            for address, base, size, unit in zip(addresses, starts, sizes, units)
        ]
        count = (targets[i].numel() - element).clamp(max=BLOCK)
        pieces.append(torch.stack([*distances, count], dim=1))
    return Group(first, torch.cat(pieces).to(targets[first].device), *units)


def _laid_out_alike(target: Tensor, source: Tensor) -> bool:
    """Without gaps and in the same order, so that element i in memory is the same element."""
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(target.dim(), [])
    return any(
        target.is_contiguous(memory_format=f) and source.is_contiguous(memory_format=f)
        for f in formats
    )


_groups: dict[tuple[object, ...], list[Group]] = {}
_captured: dict[tuple[object, ...], list[Group]] = {}  # read by CUDA graphs: never let go


def _groups_of(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Group]:
    """The list's tables, kept from the last call; the key holds everything that they say."""
    key = (
        targets[0].device,
        *(t.data_ptr() for t in targets),
        *(s.data_ptr() for s in sources),
        *(t.numel() for t in targets),
        *(t.dtype for t in targets),
        *(s.dtype for s in sources),
    )
    capturing = targets[0].is_cuda and torch.cuda.is_current_stream_capturing()
    groups = _groups.get(key)
    if groups is None:
        if capturing:
            raise RuntimeError(
                "ema_update_: call it once with these tensors before capturing a CUDA graph; "
                "the first call copies a table of their addresses to the device."
            )
        indices: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for i, (t, s) in enumerate(zip(targets, sources)):
            indices.setdefault((t.dtype, s.dtype), []).append(i)
        groups = [_group(of_types, targets, sources) for of_types in indices.values()]
        if len(_groups) == KEPT_LISTS:
            del _groups[next(iter(_groups))]
        _groups[key] = groups
    if capturing:
        _captured[key] = groups
    return groups


def update_(targets: Sequence[Tensor], sources: Sequence[Tensor], *, momentum: float) -> None:
    """Moves every target towards the source at the same place in the list, in place."""
    configs.assert_supported(*targets, *sources)
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.numel()]
    for t, s in pairs:
        assert t.shape == s.shape and t.device == s.device == pairs[0][0].device
        assert _laid_out_alike(t, s), (t.stride(), s.stride())
    if not pairs:
        return
    targets, sources = zip(*pairs)
    with torch.cuda.device_of(targets[0]):
        for group in _groups_of(targets, sources):
            update_kernel[(len(group.table),)](
                targets[group.first],
                sources[group.first],
                group.table,
                float(momentum),
                1.0 - float(momentum),
                TARGET_UNIT=group.target_unit,
                SOURCE_UNIT=group.source_unit,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
