"""What the similarity kernels share: tiles of scores, factors of the rows, the order of tiles.

    q̂_i  = q_i / max(‖q_i‖, 1e-12)          where normalize, else q_i
    s_ij = t · q̂_i · k̂_j = (t · r_i) · r_j · <q_i, k_j>

The operands stay as they are stored: r multiplies the tile of products, in float32. Exponentials
are powers of two, because that is the instruction: s₂ = s · log₂ e, with |t| in the rows' factor
(so that a maximum can be taken before it multiplies) and the sign of t in one of the operands.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# With unit rows |s₂| ≤ |t| log₂ e =: b, so 2^(s₂ − b) ≥ 2^(−2b): no maximum is needed while 2b is
# this small. 2^−100 leaves 26 binary orders above float32's smallest normal number for sums.
BOUNDED_RANGE = tl.constexpr(100.0)
# Factors below come padded to this many rows, so that no block reads them through a mask.
PADDING = 256
NORM_CLAMP = tl.constexpr(1e-12)

Pair = tuple[torch.Tensor | None, torch.Tensor | None]  # of x and of y, or of query and key


@triton.jit
def wide(i):
    """i in 64 bits: products of a row number and a row's length may exceed 32."""
    return tl.full([], 0, tl.int64) + i


@triton.jit
def load_tile(X, start, N, D, d, BLOCK: tl.constexpr, EVEN_D: tl.constexpr):
    """Rows start … start + BLOCK and columns d of X (N, D); zeros outside."""
    local = tl.arange(0, BLOCK)
    base = X + wide(start) * D  # within a tile 32 bits suffice
    mask = (start + local < N)[:, None]
    if not EVEN_D:
        mask = mask & (d < D)[None, :]
    return tl.load(base + local[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def products(
    X, Y, x_start, y_start, NX, NY, D,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> for a (BLOCK_X, BLOCK_Y) tile, D in steps of BLOCK_D, which divides it."""
    s = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
    for start_d in tl.range(0, D, BLOCK_D):
        d = start_d + tl.arange(0, BLOCK_D)
        x = load_tile(X, x_start, NX, D, d, BLOCK_X, True)
        y = load_tile(Y, y_start, NY, D, d, BLOCK_Y, True)
        s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    return s


@triton.jit
def magnitude_and_sign(SCALE):
    """|t| log₂ e, and the sign of t. Never 0, which would turn a masked −∞ into NaN."""
    scale = tl.load(SCALE).to(tl.float32)
    return tl.maximum(tl.abs(scale) * LOG2E, 1e-30), tl.where(scale < 0, -1.0, 1.0)


@triton.jit
def finite(x):
    """x, and 0 where it is −∞: what to subtract from exponents when nothing has been seen yet."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def in_groups(pid, rows, columns, GROUP: tl.constexpr):
    """The (row, column) of program pid. GROUP rows go through the columns together: what one of
    them reads is still in the L2 cache for the next."""
    per_group = GROUP * columns
    first = pid // per_group * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit(do_not_specialize=["N", "padded"])
def _factors_kernel(X, FACTOR, N, D, padded, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    square = tl.zeros([BLOCK], tl.float32)
    for start_d in tl.range(0, D, BLOCK_D):
        d = start_d + tl.arange(0, BLOCK_D)
        x = load_tile(X, start, N, D, d, BLOCK, False).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    # Any finite factor serves a row of zeros, q̂ = 0; 1 stays finite in half precision and is no 0.
    factor = tl.where(square > 0.0, 1.0 / tl.maximum(tl.sqrt(square), NORM_CLAMP), 1.0)
    i = start + tl.arange(0, BLOCK)
    tl.store(FACTOR + i, factor, mask=i < padded)


def in_whole_blocks(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x (N, D) with D made a multiple by columns of zeros, and on a 128-bit boundary.

    Zeros change no product and no norm. A copy of what is not so already costs O(N D), once; a mask
    for columns in the loop, and loads of single elements, cost more, and registers that spill.
    """
    n, d = x.shape
    wide_d = triton.cdiv(d, multiple) * multiple
    if wide_d == d and x.data_ptr() % 16 == 0:
        return x
    wide_x = x.new_zeros(n, wide_d)
    wide_x[:, :d] = x
    return wide_x


def row_factors(x: torch.Tensor) -> torch.Tensor:
    """r_i = 1 / max(‖x_i‖, 1e-12) of x (N, D), and 1 for rows of zeros: (N padded,) float32."""
    n, d = x.shape
    padded = triton.cdiv(n, PADDING) * PADDING
    factor = torch.empty(padded, dtype=torch.float32, device=x.device)
    block_d = max(16, min(triton.next_power_of_2(d), 256))
    block = 4096 // block_d
    _factors_kernel[(triton.cdiv(padded, block),)](
        x, factor, n, d, padded, BLOCK=block, BLOCK_D=block_d, num_warps=4
    )
    return factor


def factors_of(x: torch.Tensor, y: torch.Tensor, normalize: bool) -> Pair:
    return (row_factors(x), row_factors(y)) if normalize else (None, None)
