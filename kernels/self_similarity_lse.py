"""Log-sum-exp of the similarities of a set of rows with each other, itself left out.

    s_ij  = t · ẑ_i · ẑ_j                   ẑ = z / max(‖z‖, 1e-12) where normalize, else z
    lse_i = log Σ_j exp s_ij                j ≠ i, and id_j ≠ id_i
    dẑ_i  = t Σ_j (g_i p_ij + g_j p_ji) ẑ_j     p_ij = exp(s_ij − lse_i)
    dt    = ½ Σ_i <ẑ_i, Σ_j (g_i p_ij + g_j p_ji) ẑ_j>

S is symmetric: forward, a tile above the diagonal is computed once and counts in the rows of both
of its blocks (½G). Backward, a program owns a block of dz and meets every other row (2G), where
the symmetric form would need atomics; the same bits every time. Extra memory O(N D).

The kernels are similarity_lse's, with SELF. Plain version: fastcl/reference/self_similarity_lse.py.
CPU twin: csrc/self_similarity_lse.cpp.
"""

from __future__ import annotations

import torch
import triton

from fastcl.kernels import configs, similarity_lse
from fastcl.kernels._parts import finish
from fastcl.kernels._tiles import row_factors


def forward(
    z: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor | None, *, normalize: bool
) -> torch.Tensor:
    """z (N, D), scale (), ids (N,) | None -> lse (N,) float32."""
    configs.assert_supported(z)
    kernels = "similarity_pairs", "similarity_diagonal"
    (z,) = similarity_lse.whole_blocks(z, kernels=kernels, ids=ids is not None)
    n, d = z.shape
    device = z.device
    factor = row_factors(z) if normalize else None
    both = dict(NORMALIZE=normalize, HAS_IDS=ids is not None, SELF=True)
    options = similarity_lse.options_of("similarity_pairs", z, ids is not None)
    diagonal = similarity_lse.options_of("similarity_diagonal", z, ids is not None)
    tile = options["BLOCK_M"]
    per_tile = tile // options["BLOCK_N"]
    all_tiles = triton.cdiv(n, tile)
    lse = torch.empty(n, dtype=torch.float32, device=device)
    # Two tensors: the second half of one would be aligned or not, as N is.
    running = [torch.empty(n, dtype=torch.float32, device=device) for _ in range(2)]
    saved_peak = torch.empty(all_tiles, dtype=torch.float32, device=device)
    for launch, first in enumerate(range(0, all_tiles, similarity_lse.TILES_PER_LAUNCH)):
        tiles = min(similarity_lse.TILES_PER_LAUNCH, all_tiles - first)
        chunks, chunk = similarity_lse.chunk_of(z, tiles, max((first + tiles - 1) * per_tile, 1))
        row_part = torch.empty(tiles, n, dtype=torch.float32, device=device)
        column_part = torch.empty(chunks, n, dtype=torch.float32, device=device)
        peak = torch.empty(chunks, all_tiles, dtype=torch.float32, device=device)
        similarity_lse.pairs_kernel[(tiles * chunks,)](
            z, z, scale, factor, factor, ids, ids, row_part, column_part, peak,
            n, n, d, chunks, chunk, first, tiles, **both, **options,
        )  # fmt: skip
        similarity_lse.rows_kernel[(tiles * (tile // diagonal["BLOCK_N"]),)](
            z, z, scale, factor, factor, ids, ids, row_part,
            n, n, d, 1, 1, first, TILE=tile, **both, **diagonal,
        )  # fmt: skip
        finish(
            lse, z, z, scale, (factor, factor), (ids, ids),
            row_part=row_part, column_part=column_part, column_peak=peak,
            running_in=running[launch % 2] if launch > 0 else None,
            running_out=running[(launch + 1) % 2] if first + tiles < all_tiles else None,
            saved_peak=saved_peak, chunk=chunk, first_tile=first, tile=tile,
            blocks_per_tile=per_tile, is_self=True,
        )  # fmt: skip
    return lse


def backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad (N,), lse (N,) -> (grad_z (N, D), grad_scale ())."""
    configs.assert_supported(z)
    factor = row_factors(z) if normalize else None
    weights = (lse, grad)
    of_z, _ = similarity_lse.gradients(
        z, z, scale, (factor, factor), (ids, ids), weights, weights,
        wanted=(True, False), is_self=True,
    )  # fmt: skip
    assert of_z is not None
    return of_z[0], of_z[1].sum() / 2
