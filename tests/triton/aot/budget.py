"""Compile what a host function launches, for any GPU and without one, and read what came out.

    with compiling_for(90) as kernels:
        cosine.forward(prediction, target, eps=1e-8)        # CPU tensors: nothing runs
    report = examine(kernels[0])
    assert_within_budget(report)

Nothing is restated: signature, alignment, constexprs and launch options are those of the real
launch. Registers and spills come from the log of ptxas -v, which Triton throws away, and with it
the warning that wgmma instructions were serialised; instructions from cuobjdump.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from fastcl.kernels import configs

MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx942": 304}
SHARED_PER_MULTIPROCESSOR = {
    80: 167936,
    86: 102400,
    89: 102400,
    90: 233472,
    100: 233472,
    120: 102400,
}
REGISTERS_PER_MULTIPROCESSOR = 65536
# The tensor-core instruction of each generation. Blackwell's and Hopper's take operands from
# shared memory; falling back to HMMA (mma.sync) there costs at least half the rate.
TENSOR_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


class _CompileOnly(DriverBase):
    """Stands for a GPU that is not here. Each target is a device, as Triton caches by device."""

    def __init__(self, target: configs.Target) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.target, str):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> Any:
        return self.target

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed: there is no GPU behind this driver")

    def get_device_interface(self) -> Any:
        raise RuntimeError("there is no GPU behind this driver")

    def get_empty_cache_for_benchmark(self) -> Any:
        raise RuntimeError("there is no GPU behind this driver")

    def clear_cache(self, cache: Any) -> None:
        pass


@dataclass(frozen=True)
class Compiled:
    """One launch: the kernel's name, what it was compiled to, and for which GPU."""

    name: str
    target: configs.Target
    kernel: Any  # triton.compiler.CompiledKernel
    options: dict[str, Any]  # the constexprs and launch options given by keyword
    log: str  # what ptxas said; empty where Triton took the kernel from its cache


@contextlib.contextmanager
def compiling_for(target: configs.Target) -> Iterator[list[Compiled]]:
    """Every `kernel[grid](...)` inside compiles for target instead of running."""
    compiled: list[Compiled] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        options = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        compiled.append(Compiled(self.fn.__name__, target, kernel, options, log.getvalue()))
        return kernel

    saved = configs.target, configs.multiprocessors
    saved_driver, saved_dump = triton.runtime.driver._active, knobs.nvidia.dump_ptxas_log
    triton.runtime.driver.set_active(_CompileOnly(target))
    knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = run
    configs.target = lambda tensor: target
    configs.multiprocessors = lambda tensor: MULTIPROCESSORS[target]
    try:
        yield compiled
    finally:
        JITFunction.run = original
        configs.target, configs.multiprocessors = saved
        triton.runtime.driver._active = saved_driver
        knobs.nvidia.dump_ptxas_log = saved_dump


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs."""

    name: str
    target: configs.Target
    options: dict[str, Any]
    registers: int
    spill_bytes: int  # NVIDIA: stores + loads; AMD: spilled vector registers
    stack_bytes: int
    shared_bytes: int
    warps: int
    tensor_memory: int  # columns of the 512 (sm_100)
    wgmma_serialised: bool  # ptxas C7515
    warnings: list[str]
    loops: list[Counter[str]] = field(repr=False)  # opcode counts, one per innermost loop
    whole: Counter[str] = field(repr=False)

    @property
    def main_loop(self) -> Counter[str]:
        """The innermost loop with most tensor-core instructions."""
        return max(
            self.loops, key=lambda loop: (tensor_instructions(loop), total(loop)), default=Counter()
        )

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks fit at once: the least of registers, shared and tensor memory."""
        assert isinstance(self.target, int)
        registers = -(-max(self.registers, 1) // 8) * 8 * 32 * self.warps
        limits = [
            REGISTERS_PER_MULTIPROCESSOR // registers,
            SHARED_PER_MULTIPROCESSOR[self.target] // (self.shared_bytes + 1024),
            64 // self.warps,
        ]
        if self.tensor_memory:
            limits.append(512 // self.tensor_memory)
        return min(limits)

    def summary(self) -> str:
        loop = self.main_loop
        serialised = ", wgmma serialised" if self.wgmma_serialised else ""
        return (
            f"{self.name} {self.target} {self.options}: {self.registers} registers, "
            f"{self.spill_bytes} B spilled, {self.shared_bytes} B shared, main loop of "
            f"{total(loop)} instructions with {tensor_instructions(loop)} tensor and "
            f"{count(loop, 'MUFU.EX2')} exponentials{serialised}"
        )


def count(loop: Counter[str], opcode: str) -> int:
    """Instructions whose name starts with opcode: HMMA counts HMMA.16816.F32."""
    return sum(n for name, n in loop.items() if name == opcode or name.startswith(opcode + "."))


def tensor_instructions(loop: Counter[str]) -> int:
    names = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
    return sum(n for name, n in loop.items() if name.startswith(names))


def total(loop: Counter[str]) -> int:
    return sum(loop.values())


def examine(compiled: Compiled) -> Report:
    """Registers, spills, shared memory and instructions of a compiled launch."""
    kernel, metadata = compiled.kernel, compiled.kernel.metadata
    if isinstance(compiled.target, str):
        facts = _amd_facts(kernel.asm["amdgcn"])
    else:
        log = compiled.log or _ptxas_log(kernel.asm["ptx"], compiled.target)
        facts = _nvidia_facts(log, kernel.asm["cubin"])
    return Report(
        name=compiled.name,
        target=compiled.target,
        options=compiled.options,
        shared_bytes=metadata.shared,
        warps=metadata.num_warps,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        **facts,
    )


def _ptxas_log(ptx: str, arch: int) -> str:
    """What ptxas says when it is called as Triton calls it."""
    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        return subprocess.run(
            [
                *(tool.path, "-v", "-lineinfo", "--regAllocOptLevel=2"),
                f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
                *(str(source), "-o", f"{source}.cubin"),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr


@lru_cache(maxsize=256)
def _nvidia_facts(log: str, cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    number = lambda pattern: sum(map(int, re.findall(pattern, log)))  # noqa: E731
    instructions = _parse_sass(listing)
    return dict(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        wgmma_serialised="wgmma" in log and "serializ" in log,
        warnings=[l for l in log.splitlines() if re.search("warning|potential", l, re.I)],
        loops=[_opcodes(instructions, lo, hi) for lo, hi in _innermost_loops(instructions)],
        whole=_opcodes(instructions, 0, 1 << 62),
    )


_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def _parse_sass(listing: str) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of every instruction."""
    matches = map(_SASS_LINE.match, listing.splitlines())
    return [(int(m[1], 16), m[2], m[3]) for m in matches if m]


def _innermost_loops(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Address ranges closed by a backward branch that hold no smaller such range.

    Waits on a barrier are loops of a few instructions, some with their slow path far away; they
    are no loops of ours.
    """
    ranges = []
    for address, opcode, operands in instructions:
        goal = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if goal and (start := int(goal[1], 16)) <= address - 12 * 16:
            ranges.append((start, address))
    innermost: list[tuple[int, int]] = []
    for start, end in sorted(set(ranges), key=lambda r: r[1] - r[0]):
        if all(end < a or start > b for a, b in innermost):
            innermost.append((start, end))
    return sorted(innermost)


def _opcodes(instructions: list[tuple[int, str, str]], start: int, end: int) -> Counter[str]:
    return Counter(opcode for address, opcode, _ in instructions if start <= address <= end)


def _amd_facts(assembly: str) -> dict[str, Any]:
    number = lambda key: max(map(int, re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)  # noqa: E731
    # Basic blocks that branch back to themselves or earlier are close enough to loops here.
    opcodes = Counter(
        re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+)", assembly, re.M)
    )
    return dict(
        registers=number("vgpr_count") + number("agpr_count"),
        spill_bytes=number("vgpr_spill_count"),
        stack_bytes=0,
        wgmma_serialised=False,
        warnings=[],
        loops=[opcodes],
        whole=opcodes,
    )


def assert_within_budget(report: Report, *, tensor_cores: bool = False, blocks: int = 1) -> None:
    """What every shipped launch must satisfy.

    tensor_cores: the main loop must use this generation's tensor-core instruction and no older
    one. blocks: how many blocks must fit on a multiprocessor.
    """
    said = report.summary()
    assert report.spill_bytes == 0, f"registers spill: {said}"
    assert report.stack_bytes == 0, f"a stack frame of {report.stack_bytes} B: {said}"
    limit = configs.SHARED_MEMORY[report.target]
    assert report.shared_bytes <= limit, f"needs more than {limit} B of shared memory: {said}"
    assert not report.wgmma_serialised, f"{report.warnings}: {said}"
    if isinstance(report.target, int):
        assert report.blocks_per_multiprocessor >= blocks, (
            f"{report.blocks_per_multiprocessor} blocks fit on a multiprocessor: {said}"
        )
    if tensor_cores:
        loop = report.main_loop
        if isinstance(report.target, str):
            assert tensor_instructions(loop) > 0, f"no matrix instruction: {said}"
            return
        wanted = TENSOR_INSTRUCTION[report.target]
        assert count(loop, wanted) > 0, f"no {wanted} in the main loop: {said}"
        if wanted != "HMMA":
            assert count(loop, "HMMA") == 0, f"mma.sync in the main loop: {said}"
