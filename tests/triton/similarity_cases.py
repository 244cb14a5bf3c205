"""The similarity kernels against their formula in float64, for interp/ and gpu/."""

import torch

from fastcl.kernels import configs, self_similarity_lse, similarity_lse

# Small blocks: several programs, loop trips, ragged last tiles. D in one block, or in several.
WHOLE = {
    "similarity_rows": dict(BLOCK_N=32, BLOCK_M=16, BLOCK_D=64),
    "similarity_pairs": dict(BLOCK_N=16, BLOCK_M=32, BLOCK_D=64),
    "similarity_diagonal": dict(BLOCK_N=16, BLOCK_M=16, BLOCK_D=64),
    "similarity_gradient": dict(BLOCK_X=32, BLOCK_Y=16, BLOCK_D=64),
    "similarity_mean": dict(BLOCK_X=32, BLOCK_Y=16, BLOCK_D=64, BLOCK_V=64),
    "similarity_weights": dict(BLOCK_X=32, BLOCK_Y=16, BLOCK_D=64),
    "panel_sums": dict(BLOCK_X=16, BLOCK_V=64, BLOCK_Y=32),
}
TILED = {name: dict(row, BLOCK_D=16) for name, row in WHOLE.items()}
TILED["similarity_mean"]["BLOCK_V"] = 32  # shorter than the tests' rows, as BLOCK_D is
TILED["panel_sums"] = dict(BLOCK_X=16, BLOCK_V=32, BLOCK_Y=32)
BLOCKS = {"whole": WHOLE, "tiled": TILED, "shipped": {}}

# Relative to the largest entry. float32: sums in another order. Half precision: the inputs are
# exact (the truth takes them as they are stored); what is rounded is the weights' tile.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def rows_of(n, d, dtype, device, seed, spread=1.0):
    """Rows of different norms; where normalised, factors are no powers of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * spread
    x *= 1 + torch.rand(n, 1, generator=generator)
    return x.to(dtype).to(device)


def ids_of(n, count, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (n,), generator=generator).to(device) + (1 << 40)


def vector(n, device, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device)


def normalised(x):
    """x / max(‖x‖, 1e-12) with the gradient of torch.nn.functional.normalize."""
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def scores(query, key, scale, query_ids, key_ids, normalize):
    """s (N, M) in float64, −∞ where the ids are equal."""
    if normalize:
        query, key = normalised(query), normalised(key)
    s = scale * query @ key.T
    if query_ids is not None:
        s = s.masked_fill(query_ids[:, None] == key_ids[None, :], float("-inf"))
    return s


def log_sum(s, dim):
    """logsumexp whose gradient is 0, not NaN, for a row of −∞."""
    top = s.detach().amax(dim, keepdim=True).clamp_min(-1e300)
    total = (s - top).exp().sum(dim)
    lse = torch.where(total > 0, total.clamp_min(1e-300).log() + top.squeeze(dim), float("-inf"))
    return lse


def leaves(*tensors):
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


def cpu(t):
    return None if t is None else t.cpu()


def assert_close(got, expected, tolerance, what, floor=1e-30):
    """Within tolerance of the largest finite entry, or of floor where what is left of a difference
    is smaller than that; infinities where they are expected."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape, what
    finite = expected.isfinite()
    assert torch.equal(got[~finite], expected[~finite]), what
    if not finite.any():
        return
    size = expected[finite].abs().max().clamp_min(floor)
    error = (got[finite] - expected[finite]).abs().max()
    assert error <= tolerance * size, f"{what}: off by {error / size:.2e} of the largest entry"


def dotted(grad, lse):
    """<grad, lse> without the rows that are −∞."""
    return torch.where(lse.isfinite(), grad.double().cpu() * lse, 0.0).sum()


def check_similarity(
    query, key, scale, *, query_ids=None, key_ids=None, normalize, rows=True, columns=True,
    blocks="whole", tolerance=None, lse_tolerance=2e-6,
):  # fmt: skip
    """Forward (what is asked for) and backward with random cotangents."""
    tolerance = tolerance or TOLERANCE[query.dtype]
    device = query.device
    t = torch.tensor(scale, dtype=torch.float32, device=device)
    q, k, t64 = leaves(query, key, t)
    s = scores(q, k, t64, cpu(query_ids), cpu(key_ids), normalize)
    grad_rows = vector(len(query), device, 11) if rows else None
    grad_columns = vector(len(key), device, 12) if columns else None
    with configs.override(**BLOCKS[blocks]):
        row_lse, column_lse = similarity_lse.forward(
            query, key, t, query_ids, key_ids, normalize=normalize, rows=rows, columns=columns
        )
        loss = torch.zeros((), dtype=torch.float64)
        if rows:
            expected = log_sum(s, 1)
            assert_close(row_lse, expected, lse_tolerance, "row_lse")
            loss = loss + dotted(grad_rows, expected)
        else:
            assert row_lse is None
        if columns:
            expected = log_sum(s, 0)
            assert_close(column_lse, expected, lse_tolerance, "column_lse")
            loss = loss + dotted(grad_columns, expected)
        else:
            assert column_lse is None
        grad_query, grad_key, grad_scale = similarity_lse.backward(
            grad_rows, grad_columns, query, key, t, query_ids, key_ids, row_lse, column_lse,
            normalize=normalize, need_query=True, need_key=True,
        )  # fmt: skip
    expected = torch.autograd.grad(loss, (q, k, t64))
    assert grad_query.dtype == query.dtype and grad_key.dtype == key.dtype
    assert_close(grad_query, expected[0], tolerance, "grad_query", abs(scale) / 100)
    assert_close(grad_key, expected[1], tolerance, "grad_key", abs(scale) / 100)
    # Σ W <q̂, k̂> cancels: its error is relative to the sum of what it adds.
    size = (
        (expected[0] * q).sum(1).abs().sum() / (abs(scale) or 1)
        if not normalize
        else loss.detach().abs() + 1
    )
    error = (grad_scale.double().cpu() - expected[2]).abs()
    assert error <= 4 * tolerance * (size.abs() + 1), f"grad_scale off by {error}"
    return row_lse, column_lse, grad_query, grad_key, grad_scale


def check_mean(
    query, key, scale, *, query_ids=None, key_ids=None, normalize, blocks="whole", tolerance=None
):
    """forward_with_mean against the softmax-weighted mean of the keys."""
    device = query.device
    t = torch.tensor(scale, dtype=torch.float32, device=device)
    s = scores(
        query.double().cpu(), key.double().cpu(), scale, cpu(query_ids), cpu(key_ids), normalize
    )
    p = (s - log_sum(s, 1).clamp_min(-1e300)[:, None]).exp()
    k = key.double().cpu()
    expected = p @ (normalised(k) if normalize else k)
    with configs.override(**BLOCKS[blocks]):
        row_lse, mean_key = similarity_lse.forward_with_mean(
            query, key, t, query_ids, key_ids, normalize=normalize
        )
    assert_close(row_lse, log_sum(s, 1), 2e-6, "row_lse")
    assert_close(mean_key, expected, tolerance or TOLERANCE[query.dtype], "mean_key")


def check_self_similarity(z, scale, *, ids=None, normalize, blocks="whole", tolerance=None):
    """Forward and backward of self_similarity_lse."""
    device = z.device
    t = torch.tensor(scale, dtype=torch.float32, device=device)
    z64, t64 = leaves(z, t)
    s = scores(z64, z64, t64, cpu(ids), cpu(ids), normalize)
    s = s.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    expected = log_sum(s, 1)
    grad = vector(len(z), device, 13)
    with configs.override(**BLOCKS[blocks]):
        lse = self_similarity_lse.forward(z, t, ids, normalize=normalize)
        assert_close(lse, expected, 2e-6, "lse")
        grad_z, grad_scale = self_similarity_lse.backward(grad, z, t, ids, lse, normalize=normalize)
    loss = dotted(grad, expected)
    if not loss.requires_grad:
        expected_z, expected_t = torch.zeros_like(z64), torch.zeros(())
    else:
        expected_z, expected_t = torch.autograd.grad(loss, (z64, t64))
    tolerance = tolerance or TOLERANCE[z.dtype]
    assert grad_z.dtype == z.dtype
    assert_close(grad_z, expected_z, tolerance, "grad_z", abs(scale) / 100)
    error = (grad_scale.double().cpu() - expected_t).abs()
    size = (
        (expected_z * z64).sum(1).abs().sum() / (abs(scale) or 1)
        if not normalize
        else loss.detach().abs()
    )
    assert error <= 4 * tolerance * (size.abs() + 1), f"grad_scale off by {error}"
    return lse, grad_z
