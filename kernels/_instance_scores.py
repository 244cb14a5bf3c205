"""What the kernels of instance_spread share: tiles of its scores.

s_rc = t · ẑ_r·ẑ_c + [c negative] log m             c ≠ r; r's partner is (r + N) mod 2N
"""

import triton
import triton.language as tl

# A row's largest entry is large where the others' share is below this.
LARGE_SHARE = tl.constexpr(0.49)


@triton.jit
def is_special(x_start, y_start, half, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Whether a tile may have a row meet itself or its partner, at distance 0 or ±half."""
    low = y_start - x_start - BLOCK_X
    high = y_start - x_start + BLOCK_Y
    return (
        ((low < 0) & (high > 0)) | ((low < half) & (half < high)) | ((low < -half) & (-half < high))
    )


@triton.jit
def is_partner(i, j, rows):
    distance = j[None, :] - i[:, None]
    half = rows // 2
    return ((distance == half) | (distance == -half)) & (j < rows)[None, :]


@triton.jit
def log2_scores(s, f, r, log2_m, i, j, rows, special, ragged, NORMALIZE: tl.constexpr):
    """s_rc log₂ e of a tile of products; −∞ on the diagonal and beyond the last column."""
    if NORMALIZE:
        s *= r[None, :]
    s = s * f[:, None]
    if special:
        s += tl.where(is_partner(i, j, rows), 0.0, log2_m)
        s = tl.where(i[:, None] == j[None, :], float("-inf"), s)
    else:
        s += log2_m
    if ragged:
        s = tl.where((j < rows)[None, :], s, float("-inf"))
    return s
