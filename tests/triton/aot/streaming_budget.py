"""What every launch of a streaming kernel must show, read without disassembling it.

budget.examine reads the machine code, at half a second a kernel; the tables of the streaming
kernels have some fifty rows for each GPU. Spills show as a stack frame in the compiled file's
resource usage, and the width of loads in its PTX.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from budget import Compiled, compiling_for
from triton import knobs

from fastcl.kernels import configs

# The types alternate, to save time; FASTCL_AOT_ALL=1 compiles every pair, and rows of the tables
# also for sizes of another alignment.
ALL = os.environ.get("FASTCL_AOT_ALL") == "1"
TARGETS = [(80, torch.float32), (90, torch.bfloat16), (100, torch.float32)]
if ALL:
    kinds = (torch.float32, torch.bfloat16)
    TARGETS = [(target, kind) for target in (80, 90, 100) for kind in kinds]
over_targets = pytest.mark.parametrize(
    "target, dtype", TARGETS, ids=lambda x: str(x).removeprefix("torch.")
)
# How much shorter than the block a row is; only 0 promises 128-bit loads for every type.
over_ragged = pytest.mark.parametrize("short", [0, 1, 4] if ALL else [0])


def compiled_kernels(target: configs.Target, launch: Callable[[], object]) -> list[Compiled]:
    """What launch() compiles, each kernel once."""
    with compiling_for(target) as compiled:
        launch()
    return [next(same) for _, same in groupby(compiled, key=lambda c: id(c.kernel))]


def resources(compiled: Compiled) -> dict[str, int]:
    """REG, STACK, … of the compiled file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    function = usage[usage.index(f"Function {compiled.name}") :]
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", function)}


def wide_loads(compiled: Compiled) -> int:
    """How many loads of 128 bits a thread the kernel's text has."""
    return len(re.findall(r"ld\.global[.\w]*\.v4\.b32", compiled.kernel.asm["ptx"]))


def tile_loads(compiled: Compiled, elements: int, dtype: torch.dtype) -> int:
    """How many loads of 128 bits a thread needs for its part of a tile."""
    return elements * dtype.itemsize // 16 // (32 * compiled.options["num_warps"])


def assert_lean(compiled: Compiled, *, loads: int, blocks: int = 1, ragged: int = 0) -> None:
    """No spills, at least so many 128-bit loads, so many blocks on a multiprocessor.

    ragged: rows off a 128-bit boundary, where only spills are ruled out.
    """
    said = f"{compiled.name} for sm_{compiled.target}, {compiled.options}"
    usage = resources(compiled)
    assert usage["STACK"] == 0, f"{said}: spills, {usage}"
    assert compiled.kernel.metadata.shared <= configs.SHARED_MEMORY[compiled.target], said
    if ragged:
        return
    fit = 65536 // (-(-usage["REG"] // 8) * 8 * 32 * compiled.options["num_warps"])
    assert fit >= blocks, f"{said}: {fit} blocks fit, {usage}"
    assert wide_loads(compiled) >= loads, (
        f"{said}: {wide_loads(compiled)} of {loads} loads are wide"
    )
