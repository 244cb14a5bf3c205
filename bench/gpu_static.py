"""`python -m bench gpu-static`: what bounds each kernel's loop on each GPU: a static model says.

    python -m bench gpu-static                               the similarity kernels, D = 128, 256
    python -m bench gpu-static cosine queue --arch 90        every kernel of two operations
    python -m bench gpu-static --all --json out/static.json  everything; half an hour at first

Every launch is compiled as the host function makes it, and the instructions of its main loop are
set against what a multiprocessor can do in a clock. No GPU runs anything. The figures are
PREDICTIONS, good for naming the unit that bounds a loop and for ranking variants of one kernel;
latency, barriers, bank conflicts, L2 misses and clocks under load are not in the model, and its
speeds may be off by a factor of 2.

    time of a tile  = the largest of its units' times, where two blocks or more lie on a
                      multiprocessor: one block's products overlap with another's exponentials;
                      else tensor + the largest of exp, fp32, alu and issue
    fraction        = 0.75 · tensor / time of a tile
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from bench.compiled import (
    TARGETS,
    Compiled,
    Report,
    compiling_for,
    examine,
    exponentials,
    tensor_instructions,
    total,
)
from bench.gpu_launches import LAUNCHES, NORMALIZED, PRODUCTS, Case, cases, is_product
from fastcl.kernels import configs

NOTE = (
    "Predictions of a static model of compiled code, not measurements: no GPU ran any of this. "
    "The unit that bounds a loop is the model's best statement; speeds may be off by a factor of 2."
)


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor (AMD: compute unit) does in a clock, dense bfloat16."""

    tensor: int  # FLOP, float32 accumulation
    fp32: int  # multiply-adds, adds or multiplications
    alu: int  # compares, selects, minima, integers, conversions
    exp: int  # exponentials, logarithms, reciprocals, roots: MUFU
    issue: int  # warp instructions
    shared: int  # bytes of shared memory, and of shuffles
    l2: int | None  # bytes from the L2 cache; None: no figure that can be relied on
    memory: float  # bytes from device memory


# tensor: the vendors' dense peak / (multiprocessors · boost clock), rounded to the power of two
#   that the hardware has: A100 312 TFLOP/s / (108 · 1.41 GHz), A40 149.7 / (84 · 1.74),
#   L40S 362 / (142 · 2.52), H100 SXM 989 / (132 · 1.83), B200 2250 / (148 · 1.85),
#   RTX PRO 6000 Blackwell 504 / (188 · 2.6), MI300X 1307 / (304 · 2.1). GeForce cards of
#   generation 86, 89 and 120 have half of it with float32 accumulation.
# fp32, alu, exp: results per clock in the CUDA programming guide, "Throughput of native arithmetic
#   instructions". MI300X: 4 SIMDs of 16 lanes, transcendentals a quarter (AMD's CDNA 3 ISA guide).
# issue: 4 schedulers of one warp instruction a clock, since Volta; CDNA: 4 SIMDs.
# shared: 128 bytes a clock (NVIDIA's tuning guides; CDNA 3 whitepaper: LDS).
# l2: A100 whitepaper, 5,120 bytes a clock / 108; H100: 5.5 to 6 TB/s are published measurements,
#   / (132 · 1.83 GHz) = 24 rounded to 28 with the upper one: the softest number here.
# memory: the vendors' bandwidth / (multiprocessors · boost clock): 2,039 GB/s, 696, 864, 3,350,
#   8,000, 1,792, 5,300.
RATES: dict[configs.Target, Rates] = {
    80: Rates(2048, 64, 64, 16, 4, 128, 47, 13.4),
    86: Rates(1024, 128, 64, 16, 4, 128, None, 4.8),
    89: Rates(1024, 128, 64, 16, 4, 128, None, 2.4),
    90: Rates(4096, 128, 64, 16, 4, 128, 28, 13.9),
    100: Rates(8192, 128, 64, 16, 4, 128, None, 29.2),
    120: Rates(1024, 128, 64, 16, 4, 128, None, 3.7),
    "gfx942": Rates(2048, 64, 64, 16, 4, 128, None, 8.3),
}
assert set(RATES) == set(TARGETS)

# What kernels of this structure reach of such a bound: FlashAttention-3 reports 740 TFLOP/s on the
# H100 at D = 128, where the bound is the peak (Shah et al. 2024, arXiv:2407.08608).
REACHED = 0.75

NO_LANES = re.compile(  # scheduling, barriers, the uniform datapath, tensor memory
    r"U[A-Z]|R2UR|BAR|BRA|BSYNC|BSSY|WARP|DEPBAR|LDGDEPBAR|SYNCS|NOP|FENCE|MEMBAR|ELECT|S2|"
    r"CCTL|EXIT|ERRBAR|LDTM|STTM|LDC|NANOSLEEP|YIELD|CALL|RET|ARRIVES|CS2R|s_|v_nop"
)


def transferred(opcode: str) -> int:
    """Bytes that one thread's load or store moves, from the instruction's name."""
    if opcode.startswith(("LDSM", "STSM")):  # 8×8 matrices of two bytes: 4 bytes a thread each
        matrices = re.search(r"M[T]?\d\d\.(\d)$", opcode)
        return 4 * int(matrices[1]) if matrices else 4
    if opcode[0].isupper():
        parts = opcode.split(".")
        for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if name in parts:
                return size
        return 4
    if opcode.startswith("ds_"):  # ds_read_b128, ds_read2_b64, ds_read_u16
        bits = int(re.findall(r"\d+", opcode.removesuffix("_d16_hi"))[-1])
        return bits // 8 * (2 if re.match(r"ds_\w+?2(st64)?_", opcode) else 1)
    if size := re.search(r"dwordx(\d)", opcode):
        return 4 * int(size[1])
    return 2 if "short" in opcode else 1 if "byte" in opcode else 4


def flops_of(opcode: str) -> int | None:
    """Of one tensor-core instruction of a warp (HGMMA: of four); None where its name hides it."""
    if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode) or re.match(
        r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode
    ):
        return 2 * int(m[1]) * int(m[2]) * int(m[3])
    if m := re.match(r"HMMA\.(16)(8)(\d+)", opcode):
        return 2 * int(m[1]) * int(m[2]) * int(m[3])
    return None


def operand_bytes(opcode: str) -> int:
    """Of one HGMMA from shared memory: B (K, N), and A (M, K) where it is not in registers."""
    m = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode)
    if not m:
        return 0
    rows, columns, depth = int(m[1]), int(m[2]), int(m[3])
    return 2 * depth * (columns + (rows if opcode.endswith(".SS") else 0))


@dataclass(frozen=True)
class Prediction:
    """Clocks of one tile of a block, by unit, and what follows."""

    clocks: dict[str, float]
    bound: str  # the unit that takes longest
    of: str  # the peak that the fractions refer to: tensor, fp32 or memory
    alone: float  # fraction of that peak without overlap between blocks
    overlapped: float  # with perfect overlap
    predicted: float


def predict(
    opcodes: Counter[str],
    target: configs.Target,
    warps: int,
    blocks: int,
    *,
    flops: int = 0,
    products: bool = True,
) -> Prediction:
    """What bounds a loop whose trip executes `opcodes` in each of a block's warps.

    blocks: of those how many share a multiprocessor. flops: of the algorithm, for a tile of the
    block. products: whether its loads are operands that many blocks read, and so from the L2 cache.
    """
    rates = RATES[target]
    lanes = (64 if isinstance(target, str) else 32) * warps
    work: dict[str, float] = Counter()
    tensor = tensor_instructions(opcodes)
    for opcode, n in opcodes.items():
        if opcode.startswith(("MUFU", "v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt")):
            work["exp"] += n * lanes
        elif opcode.startswith(("HMMA", "HGMMA", "UTCHMMA", "v_mfma")):
            work["shared"] += n * operand_bytes(opcode) * warps / 4
        elif opcode.startswith(("FFMA", "FADD", "FMUL")):
            work["fp32"] += n * lanes * (2 if re.match("F[A-Z]+2", opcode) else 1)
        elif opcode.startswith(("LDS", "STS", "ds_", "SHFL")):
            work["shared"] += n * lanes * transferred(opcode)
        elif opcode.startswith("LDGSTS"):
            work["memory"] += n * lanes * transferred(opcode)
            work["shared"] += n * lanes * transferred(opcode)
        elif opcode.startswith(("LDG.", "STG.", "global_", "buffer_")):
            if products:  # factors of rows: a few addresses for all lanes, one access to the L1
                work["shared"] += n * warps * rates.shared
            else:
                work["memory"] += n * lanes * transferred(opcode)
        elif not NO_LANES.match(opcode):
            work["alu"] += n * lanes
    clocks = {unit: work[unit] / getattr(rates, unit) for unit in ("exp", "fp32", "alu", "shared")}
    clocks["issue"] = total(opcodes) * warps / rates.issue
    # What AMD's vector instructions do for float32 is among the others: one pipe.
    if products and rates.l2 is not None:
        clocks["memory"] = work["memory"] / rates.l2
    elif not products:
        clocks["memory"] = work["memory"] / rates.memory
    if tensor:
        clocks["tensor"] = flops / rates.tensor
    of = "tensor" if tensor else "fp32" if products else "memory"
    peak = flops / 2 / rates.fp32 if of == "fp32" else clocks[of]
    longest = max(clocks.values())
    bound = max(clocks, key=lambda unit: clocks[unit])
    alone = overlapped = peak / longest if longest else 0.0
    if tensor:
        others = max(clocks[unit] for unit in ("exp", "fp32", "alu", "issue"))
        alone = peak / max(longest, clocks["tensor"] + others)
    reached = REACHED * (overlapped if blocks >= 2 else alone)
    return Prediction(clocks, bound, of, alone, overlapped, reached)


def flops_of_tile(name: str, options: dict[str, Any], d: int) -> tuple[int, float]:
    """-> executed for a tile of a product kernel, and the share of it that the result needs: all
    but the padding of D to whole blocks."""
    x = options.get("BLOCK_X") or options["BLOCK_N"]
    y = options.get("BLOCK_Y") or options["BLOCK_M"]
    padded, summed = (
        steps_of(options, d) * options.get("BLOCK_D", 0),
        features_summed(name, options),
    )
    needed = (d if padded else 0) + (min(d, summed) if padded else d / -(-d // summed))
    return 2 * x * y * (padded + summed), needed / (padded + summed)


def features_summed(name: str, options: dict[str, Any]) -> int:
    """Of those of a tile's weighted sum, for kernels that form one."""
    return options.get("BLOCK_V") or (options["BLOCK_D"] if name == "gradient_kernel" else 0)


def steps_of(options: dict[str, Any], d: int) -> int:
    """Blocks of features that the products of one tile are made of."""
    return -(-d // options["BLOCK_D"]) if "BLOCK_D" in options else 0


def tensor_work(opcodes: Counter[str], report: Report) -> int:
    """FLOP of a block; where instructions do not name their size, how many have a depth of 16."""
    warps = report.warps / 4 if report.target == 90 else report.warps
    if report.target == 100:
        return tensor_instructions(opcodes)
    return int(warps * sum(n * (flops_of(opcode) or 0) for opcode, n in opcodes.items()))


def tensor_work_needed(report: Report, d: int) -> int:
    """The same of the algorithm."""
    options = report.options
    if report.target == 100:  # one instruction has all of a tile's rows and columns
        depth = steps_of(options, d) * options.get("BLOCK_D", 0)
        return (depth + (options["BLOCK_Y"] if features_summed(report.name, options) else 0)) // 16
    return flops_of_tile(report.name, options, d)[0]


def trips_of(report: Report, d: int) -> int:
    """How often the loop over blocks of D runs for one tile, without the trips that the compiler
    has taken out of it."""
    steps, main = steps_of(report.options, d), report.main
    inside = sum(tensor_work(loop.opcodes(), report) for loop in main.inner) if main else 0
    if main is None or not inside:
        return steps
    trips, rest = divmod(tensor_work_needed(report, d) - tensor_work(main.own, report), inside)
    return trips if rest == 0 and steps - 2 <= trips <= steps else steps


def tile_of(report: Report, d: int) -> Counter[str]:
    """What a product kernel executes for one tile.

    That of weights_kernel is the program: its loop over blocks of D, and all that surrounds it,
    both alternatives of a branch among it.
    """
    if report.main is None:
        return report.whole
    if report.name != "weights_kernel":
        return report.main.opcodes(trips_of(report, d))
    loop = report.main.opcodes()
    around = report.whole - loop
    trips, rest = divmod(
        tensor_work_needed(report, d) - tensor_work(around, report), tensor_work(loop, report) or 1
    )
    if rest or not tensor_work(loop, report):
        trips = steps_of(report.options, d)
    return around + Counter({opcode: trips * n for opcode, n in loop.items()})


@dataclass(frozen=True)
class Row:
    """One launch on one GPU."""

    operation: str
    kernel: str
    target: configs.Target
    d: int
    dtype: str
    options: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    tensor: int  # instructions of a warp for one tile, and below
    exponentials: int
    instructions: int
    flops: int  # of the tile; 0 where there are no products
    useful: float  # share of them that no block computes twice or pads
    prediction: Prediction


def row_of(operation: str, case: Case, report: Report) -> Row:
    products = is_product(report.word, report.name)
    if products:
        opcodes = tile_of(report, case.d)
    else:  # a kernel without a loop is one tile
        opcodes = report.longest.opcodes(1) if report.longest else report.whole
    flops, useful = flops_of_tile(report.name, report.options, case.d) if products else (0, 1.0)
    if products and report.target != 100:
        # Where a tile has fewer pieces than the block has warps, some do the same products.
        executed = max(flops, tensor_work(opcodes, report))
        flops, useful = executed, useful * flops / executed
    blocks = report.blocks_per_multiprocessor
    named = ("SELF", "OWN", "OTHER", "HAS_ROWS", "HAS_COLUMNS", "HAS_IDS", "TRANSPOSED")
    flags = [k.lower().removeprefix("has_") for k in named if report.options.get(k)]
    return Row(
        operation=operation,
        kernel=f"{report.name.removesuffix('_kernel')}{' ' * bool(flags)}{'+'.join(flags)}",
        target=report.target,
        d=case.d,
        dtype=str(case.dtype).removeprefix("torch."),
        options=report.options,
        registers=report.registers,
        spill_bytes=report.spill_bytes,
        shared_bytes=report.shared_bytes,
        blocks=blocks,
        tensor=tensor_instructions(opcodes),
        exponentials=exponentials(opcodes),
        instructions=total(opcodes),
        flops=flops,
        useful=useful,
        prediction=predict(
            opcodes, report.target, report.warps, blocks, flops=flops, products=products
        ),
    )


def rows_of(operation: str, case: Case, target: configs.Target, only_products: bool) -> list[Row]:
    """Every kernel that an operation launches, once."""
    with compiling_for(target, PRODUCTS.__contains__ if only_products else None) as launches:
        LAUNCHES[operation](case)
    different: dict[str, Compiled] = {launch.kernel.hash: launch for launch in launches}
    return [row_of(operation, case, examine(launch)) for launch in different.values()]


COLUMNS = (
    f"{'kernel':<24}{'GPU':<7}{'D':>5} {'block':<12}{'regs':>5}{'spill':>6}{'KB':>5}{'blocks':>7}"
    f"{'tensor':>8}{'EX2':>5}{'instr':>7}  {'bound':<7}"
    f"{'alone':>6}{'best':>6}{'pred.':>7} {'useful':>7}"
)
LEGEND = """\
regs a thread, spill bytes, KB of shared memory a block, blocks on a multiprocessor; tensor, EX2 and
all instructions of a warp for one tile, by the cheapest way through the loop (of weights: by all
ways through the program); bound: the unit that
takes longest; of the tensor peak (f: of float32's, m: of the memory's) what one block alone and
perfect overlap would give, and the prediction; useful: share of the multiplications that the
result needs, the rest being computed again or padding. No L2 limit is in the figures but for
sm_80 and sm_90, no traffic of tensor-core operands but for sm_90's."""


def line_of(row: Row) -> str:
    p, o = row.prediction, row.options
    tile = "×".join(str(o[k]) for k in o if k.startswith("BLOCK_") and k[-1] in "NMXYTK")
    tile += f" w{o.get('num_warps', 4)}"
    mark = {"tensor": " ", "fp32": "f", "memory": "m"}[p.of]
    gpu = f"sm_{row.target}" if isinstance(row.target, int) else row.target
    return (
        f"{row.kernel:<24}{gpu:<7}{row.d:>5} {tile:<12}"
        f"{row.registers:>5}{row.spill_bytes:>6}{row.shared_bytes / 1024:>5.0f}{row.blocks:>7}"
        f"{row.tensor:>8}{row.exponentials:>5}{row.instructions:>7}  {p.bound:<7}"
        f"{p.alone:>6.0%}{p.overlapped:>6.0%}{p.predicted:>6.0%}{mark} {row.useful:>7.0%}"
    )


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench gpu-static",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    p.add_argument("kernels", nargs="*", metavar="kernel", help=f"of {', '.join(LAUNCHES)}")
    p.add_argument("--arch", default="80,90,100,gfx942", help=f"of {named(TARGETS)}")
    p.add_argument("--d", default="128,256", help="features of a row, or classes (128,256)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--all", action="store_true", help="every kernel, GPU, D, type and variant")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZES = (32, 64, 100, 128, 256, 512, 1024, 2048)


def named(targets: Iterable[configs.Target]) -> str:
    return ", ".join(map(str, targets))


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)

    def usage(line: str) -> int:
        print(f"python -m bench gpu-static: {line}", file=sys.stderr)
        return 2

    for word in options.kernels:
        if word not in LAUNCHES:
            return usage(f"unknown kernel {word!r}. Kernels: {', '.join(LAUNCHES)}")
    by_name = {str(target): target for target in TARGETS}
    for name in listed(options.arch):
        if name.removeprefix("sm_") not in by_name:
            return usage(f"unknown architecture {name!r}. Architectures: {named(TARGETS)}")
    if not all(d.isdecimal() and int(d) > 0 for d in listed(options.d)):
        return usage(f"--d takes positive numbers such as 128,256; got {options.d!r}.")
    if configs.INTERPRETED:
        return usage("needs the compiler: unset TRITON_INTERPRET.")

    words = options.kernels or (list(LAUNCHES) if options.all else list(NORMALIZED))
    targets = [by_name[name.removeprefix("sm_")] for name in listed(options.arch)]
    rows: list[Row] = []
    print(NOTE + "\n")
    for word in words:
        if options.all:
            each = cases(word, SIZES, tuple(DTYPES.values()))
            targets = list(TARGETS)
        else:
            each = [Case(int(d), DTYPES[options.dtype]) for d in listed(options.d)]
        print(f"{word}\n{COLUMNS}")
        for case in each:
            if options.all:
                print(f"-- {case}")
            for target in targets:
                new = rows_of(word, case, target, not options.kernels and not options.all)
                rows += new
                for row in new:
                    print(line_of(row), flush=True)
        print()
    print(LEGEND)
    if options.json:
        save(options.json, arguments, rows)
    return 0


def save(path: Path, arguments: list[str], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "note": NOTE,
        "command": " ".join(["python -m bench gpu-static", *arguments]),
        "triton": triton.__version__,
        "rates": {str(target): asdict(rates) for target, rates in RATES.items()},
        "reached": REACHED,
        "rows": [asdict(row) for row in rows],
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str))
    os.replace(temporary, path)
