"""Compile what a host function launches, for any GPU and without one, and read what came out.

    with compiling_for(90) as launches:
        cosine.forward(prediction, target, eps=1e-8)        # CPU tensors: nothing runs
    report = examine(launches[0])                           # registers, spills, instructions, …

Nothing is restated: signature, alignment, constexprs and launch options are those of the real
launch. Registers and spills come from the log of ptxas -v, which Triton throws away, and with it
the warning that wgmma instructions were serialised; instructions from cuobjdump, which takes as
long as the compiler and is called when they are asked for. For AMD both lie in the assembly. What
was read is kept in Triton's cache beside the kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from bench.machine_code import Loop, loops_of, parse_amd, parse_sass
from fastcl.kernels import configs

# GPUs that every shipped launch is compiled for.
TARGETS: tuple[configs.Target, ...] = (80, 86, 89, 90, 100, 120, "gfx942")
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188, "gfx942": 304}
SHARED_PER_MULTIPROCESSOR = {
    80: 167936,
    86: 102400,
    89: 102400,
    90: 233472,
    100: 233472,
    120: 102400,
}
WARPS_PER_MULTIPROCESSOR = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
REGISTERS_PER_MULTIPROCESSOR = 65536
# The tensor-core instruction of each generation. Blackwell's and Hopper's take operands from
# shared memory; falling back to HMMA (mma.sync) there costs at least half the rate.
TENSOR_INSTRUCTION: dict[configs.Target, str] = {
    80: "HMMA",
    86: "HMMA",
    89: "HMMA",
    90: "HGMMA",
    100: "UTCHMMA",
    120: "HMMA",
    "gfx942": "v_mfma",
}


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
    word: str  # the file in kernels/ that the kernel stands in
    target: configs.Target
    kernel: Any  # triton.compiler.CompiledKernel
    options: dict[str, Any]  # the constexprs and launch options given by keyword
    log: str  # what ptxas said; empty where Triton took the kernel from its cache


@contextlib.contextmanager
def compiling_for(
    target: configs.Target, only: Callable[[str], bool] | None = None
) -> Iterator[list[Compiled]]:
    """Every `kernel[grid](...)` inside compiles for target instead of running.

    only: compile the kernels with these names and leave the others out.
    """
    assert not configs.INTERPRETED, "TRITON_INTERPRET=1 was set when triton was imported"
    compiled: list[Compiled] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if only is not None and not only(self.fn.__name__):
            return None
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        options = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        word = self.fn.__module__.rpartition(".")[2]
        compiled.append(Compiled(self.fn.__name__, word, target, kernel, options, log.getvalue()))
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
    word: str
    target: configs.Target
    options: dict[str, Any]
    registers: int  # of a thread; AMD: vector registers, accumulation registers among them
    spill_bytes: int  # stores + loads; AMD: 4 for each vector register that went to memory
    scalar_spills: int  # AMD: scalar registers that went to lanes of vector registers, not memory
    stack_bytes: int  # AMD: private segment of a thread
    shared_bytes: int
    warps: int
    tensor_memory: int  # columns of the 512 (sm_100)
    wgmma_serialised: bool  # ptxas C7515
    warnings: list[str]
    compiled: Compiled = field(repr=False)

    @property
    def loops(self) -> list[Loop]:
        """The outermost ones."""
        return [Loop.of(loop) for loop in _kept("code", self.compiled, _code)["loops"]]

    @property
    def whole(self) -> Counter[str]:
        """Every instruction of the kernel."""
        return Counter(_kept("code", self.compiled, _code)["whole"])

    @property
    def main(self) -> Loop | None:
        """The outermost loop with most tensor-core instructions, or the longest."""
        return max(
            self.loops,
            key=lambda loop: (tensor_instructions(loop.opcodes()), total(loop.opcodes())),
            default=None,
        )

    @property
    def longest(self) -> Loop | None:
        """The longest outermost loop without tensor-core instructions."""
        loops = [loop for loop in self.loops if not tensor_instructions(loop.opcodes())]
        return max(loops, key=lambda loop: total(loop.opcodes()), default=None)

    @property
    def main_loop(self) -> Counter[str]:
        """The instructions of one trip through it, by the cheapest way; of an inner loop once."""
        return self.main.opcodes() if self.main else Counter()

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks fit at once: the least of registers, shared and tensor memory."""
        if isinstance(self.target, str):  # CDNA 3: 512 registers a lane, 8 waves a SIMD, 64 KB
            waves = min(512 // (-(-max(self.registers, 1) // 8) * 8), 8)
            return min(4 * waves // self.warps, 65536 // max(self.shared_bytes, 1))
        registers = -(-max(self.registers, 1) // 8) * 8 * 32 * self.warps
        limits = [
            REGISTERS_PER_MULTIPROCESSOR // registers,
            SHARED_PER_MULTIPROCESSOR[self.target] // (self.shared_bytes + 1024),
            WARPS_PER_MULTIPROCESSOR[self.target] // self.warps,
        ]
        if self.tensor_memory:
            limits.append(512 // self.tensor_memory)
        return min(limits)

    def __str__(self) -> str:
        loop = self.main_loop
        serialised = ", wgmma serialised" if self.wgmma_serialised else ""
        return (
            f"{self.word}.{self.name} {self.target} {self.options}: {self.registers} registers, "
            f"{self.spill_bytes} B spilled, {self.shared_bytes} B shared, main loop of "
            f"{total(loop)} instructions with {tensor_instructions(loop)} tensor and "
            f"{exponentials(loop)} exponentials{serialised}"
        )


def count(loop: Counter[str], opcode: str) -> int:
    """Instructions whose name starts with opcode: HMMA counts HMMA.16816.F32."""
    return sum(n for name, n in loop.items() if name == opcode or name.startswith(opcode + "."))


def tensor_instructions(loop: Counter[str]) -> int:
    names = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
    return sum(n for name, n in loop.items() if name.startswith(names))


def exponentials(loop: Counter[str]) -> int:
    return sum(n for name, n in loop.items() if name.startswith(("MUFU.EX2", "v_exp_f32")))


def total(loop: Counter[str]) -> int:
    return sum(loop.values())


def examine(compiled: Compiled) -> Report:
    """Registers, spills, shared memory and, where asked for, instructions of a compiled launch."""
    metadata = compiled.kernel.metadata
    return Report(
        name=compiled.name,
        word=compiled.word,
        target=compiled.target,
        options=compiled.options,
        shared_bytes=metadata.shared,
        warps=metadata.num_warps,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        compiled=compiled,
        **_kept("costs", compiled, _costs),
    )


@lru_cache(maxsize=1)
def _version() -> str:
    """Another one whenever this file or the reading of machine code changes."""
    folder = Path(__file__).parent
    text = "".join((folder / f"{name}.py").read_text() for name in ("compiled", "machine_code"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Facts = dict[str, Any]
_known: dict[tuple[str, str], Facts] = {}


def _kept(kind: str, compiled: Compiled, read: Callable[[Compiled], Facts]) -> Facts:
    """Read from the kernel once; later from memory, or from Triton's cache of that kernel."""
    key = kind, compiled.kernel.hash
    if key not in _known:
        cache = get_cache_manager(compiled.kernel.hash)
        name = f"{kind}-{_version()}.json"
        stored = cache.get_file(name)
        if stored:
            _known[key] = json.loads(Path(stored).read_text())
        else:
            _known[key] = read(compiled)
            cache.put(json.dumps(_known[key]), name, binary=False)
    return _known[key]


def _costs(compiled: Compiled) -> Facts:
    asm = compiled.kernel.asm
    if isinstance(compiled.target, str):
        return _costs_of_assembly(asm["amdgcn"])
    return _costs_of_log(compiled.log or _ptxas_log(asm["ptx"], compiled.target))


def _code(compiled: Compiled) -> Facts:
    asm = compiled.kernel.asm
    if isinstance(compiled.target, str):
        instructions = parse_amd(asm["amdgcn"])
    else:
        instructions = parse_sass(_disassembled(asm["cubin"]))
    return dict(
        loops=[loop.as_dict() for loop in loops_of(instructions)],
        whole=Counter(i.opcode for i in instructions),
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


def _costs_of_log(log: str) -> Facts:
    registers = re.findall(r"Used (\d+) registers", log)
    assert registers, f"ptxas -v did not say how many registers are used:\n{log}"
    return dict(
        registers=max(map(int, registers)),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        scalar_spills=0,
        stack_bytes=sum(map(int, re.findall(r"(\d+) bytes stack frame", log))),
        wgmma_serialised="wgmma" in log and "serializ" in log,
        warnings=[l for l in log.splitlines() if re.search("warning|potential", l, re.I)],
    )


def _costs_of_assembly(assembly: str) -> Facts:
    def number(key: str) -> int:
        values = re.findall(rf"\.{key}:\s+(\d+)", assembly)
        assert len(values) == 1, f"{len(values)} times {key} in the assembly"
        return int(values[0])

    return dict(
        registers=number("vgpr_count"),
        spill_bytes=4 * number("vgpr_spill_count"),
        scalar_spills=number("sgpr_spill_count"),
        stack_bytes=number("private_segment_fixed_size"),
        wgmma_serialised=False,
        warnings=[],
    )


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
