"""`python -m bench gpu-static`: what bounds each kernel's loop on each GPU: a static model says.

    python -m bench gpu-static                               the similarity kernels, D = 128, 256
    python -m bench gpu-static cosine queue --arch 90        every kernel of two operations
    python -m bench gpu-static --all --json out/static.json  everything; half an hour at first

Every launch is compiled as the host function makes it, and the instructions of its main loop are
set against what a multiprocessor can do in a clock, by the model in bench/gpu_model.py. No GPU runs
anything: the figures are PREDICTIONS, whose speeds may be off by a factor of 2.
"""

from __future__ import annotations

import argparse
import json
import os
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
from bench.gpu_model import RATES, REACHED, Prediction, flops_of, predict
from fastcl.kernels import configs

NOTE = (
    "Predictions of a static model of compiled code, not measurements: no GPU ran any of this. "
    "The unit that bounds a loop is the model's best statement; speeds may be off by a factor of 2."
)


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
