"""What a multiprocessor of each GPU does in a clock, and what so bounds a loop: a static model.

Predictions, good for naming the unit that bounds a loop and for ranking variants of one kernel;
latency, barriers, bank conflicts, L2 misses and clocks under load are not in the model, and its
speeds may be off by a factor of 2.

    time of a tile  = the largest of its units' times, where two blocks or more lie on a
                      multiprocessor: one block's products overlap with another's exponentials;
                      else tensor + the largest of exp, fp32, alu and issue
    fraction        = 0.75 · tensor / time of a tile
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from bench.compiled import TARGETS, tensor_instructions, total
from fastcl.kernels import configs


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
