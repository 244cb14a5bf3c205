"""Checks of the streaming operations, shared by interp/ (float32, float16) and gpu/ (bfloat16 too).

Truth is the formula in float64, on the inputs as rounded to their dtype. An output may be as far
from it as plain PyTorch in float32 is, plus a stated slack and the rounding of its own dtype.
"""

from pathlib import Path

import numpy as np
import torch

from fastcl.kernels import cosine, ema, queue, sinkhorn, soft_cross_entropy
from fastcl.reference import cosine as reference_cosine
from fastcl.reference import sinkhorn as reference_sinkhorn
from fastcl.reference import soft_cross_entropy as reference_soft_cross_entropy

GOLDEN = Path(__file__).parents[1] / "golden"
LOSS_SLACK = 2e-6  # relative to the largest entry
GRAD_SLACK = 1e-5


def golden(name):
    """Arrays of a golden file as tensors; text and flags stay as they are."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {
            k: torch.from_numpy(file[k]) if file[k].dtype.kind == "f" else file[k]
            for k in file.files
        }


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def assert_near(actual, truth, slack, plain=None, size=0.0):
    """|actual − truth| ≤ |plain − truth| (the largest) + slack · largest entry + rounding.

    size: of the terms whose difference is the truth, where they may cancel.
    """
    actual, truth = actual.detach().cpu(), truth.detach().cpu()
    assert actual.shape == truth.shape
    assert truth.dtype == torch.float64
    finite = truth.isfinite()
    assert torch.equal(actual.double()[~finite], truth[~finite])  # the same infinities; no NaN
    actual64, truth = actual.double()[finite], truth[finite]
    if not truth.numel():
        return
    allowed = slack * truth.abs().max().clamp(min=size)
    if plain is not None:
        allowed = allowed + (plain.detach().cpu().double()[finite] - truth).abs().max()
    info = torch.finfo(actual.dtype)
    rounding = info.eps / 2 * truth.abs() + info.smallest_normal * info.eps
    error = (actual64 - truth).abs()
    worst = (error - rounding - allowed).argmax()
    assert (error <= allowed + rounding).all(), (
        f"off by {error[worst]:.3g} at {truth[worst]:.6g}, where {allowed + rounding[worst]:.3g} "
        f"is allowed; {actual64[worst]:.6g}"
    )


def gradients(formula, cotangent, *inputs):
    """Autograd's, of Σ cotangent · formula(*inputs), in the inputs' dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad((formula(*leaves) * cotangent).sum(), leaves)


# ---- cosine


def check_cosine(p, t, eps=1e-8):
    """p, t (N, D); random cotangent."""
    g = randn(len(p), seed=9, device=p.device)
    loss = cosine.forward(p, t, eps=eps)
    dp, dt = cosine.backward(g, p, t, eps=eps, need_prediction=True, need_target=True)
    assert (loss.dtype, dp.dtype, dt.dtype) == (torch.float32, p.dtype, t.dtype)

    def formula(p, t):
        return reference_cosine.cosine(p, t, eps=eps)

    p64, t64, g64 = p.cpu().double(), t.cpu().double(), g.cpu().double()
    p32, t32, g32 = p.cpu().float(), t.cpu().float(), g.cpu()
    assert_near(loss, formula(p64, t64), LOSS_SLACK, formula(p32, t32))
    truth, plain = gradients(formula, g64, p64, t64), gradients(formula, g32, p32, t32)
    for grad, true, rough, x in zip((dp, dt), truth, plain, (p64, t64)):
        size = (g64.abs() / x.norm(dim=1).clamp(min=eps)).max().item()
        assert_near(grad, true, GRAD_SLACK, rough, 0.1 * size)


def check_cosine_below_eps(device):
    """Zero rows, rows whose norm is below ε (no projection), aligned and opposite rows."""
    p, t = randn(8, 24, device=device), randn(8, 24, seed=1, device=device)
    p[0] = 0
    t[1] = 0
    p[2] *= 1e-3 / p[2].norm()
    t[3] *= 1e-3 / t[3].norm()
    p[4], t[4] = 0, 0
    t[5], t[6] = 3 * p[5], -p[6]
    check_cosine(p, t, eps=1e-2)
    # Each row by itself, so that a large gradient does not hide a small one.
    for row in range(8):
        check_cosine(p[row : row + 1].clone(), t[row : row + 1].clone(), eps=1e-2)


def check_cosine_golden(device):
    """SimSiam's and BYOL's losses and gradients as their code computes them."""
    for name in ("simsiam_loss_b3_d2048", "simsiam_loss_degenerate_b12_d96", "byol_loss_b19_d256"):
        data = golden(name)
        p1, p2, z1, z2 = (data[k].to(device) for k in ("p1", "p2", "z1", "z2"))
        # −½ (mean cos + mean cos), or the sum of the two means of 2 − 2 cos.
        factor, offset, eps = (2.0, 4.0, 1e-6) if "byol" in name else (0.5, 0.0, 1e-8)
        losses = [cosine.forward(p, z, eps=eps) for p, z in ((p1, z2), (p2, z1))]
        loss = offset + factor * sum(l.mean() for l in losses)
        assert abs(loss.item() - data["loss_f64"].item()) < 2e-6, name
        for p, z, key in ((p1, z2, "grad_p1_f64"), (p2, z1, "grad_p2_f64")):
            g = torch.full((len(p),), factor / len(p), device=device)
            dp, none = cosine.backward(g, p, z, eps=eps, need_prediction=True, need_target=False)
            assert none is None
            assert_near(dp, data[key], 2e-6)


# ---- soft cross entropy


def check_soft_cross_entropy(x, y, scale):
    """x, y (N, K); random cotangent."""
    scale = torch.tensor(scale, device=x.device)
    g = randn(len(x), seed=9, device=x.device)
    loss, lse, mass = soft_cross_entropy.forward(x, y, scale)
    dx, dscale = soft_cross_entropy.backward(g, x, y, scale, lse, mass)
    assert loss.dtype == lse.dtype == mass.dtype == dscale.dtype == torch.float32
    assert dx.dtype == x.dtype and dscale.shape == ()

    formula = reference_soft_cross_entropy.soft_cross_entropy
    x64, y64, s64, g64 = (a.cpu().double() for a in (x, y, scale, g))
    x32, y32, s32, g32 = (a.cpu().float() for a in (x, y, scale, g))
    assert_near(loss, formula(x64, y64, s64), LOSS_SLACK, formula(x32, y32, s32))
    assert_near(lse, (s64 * x64).logsumexp(1), LOSS_SLACK, (s32 * x32).logsumexp(1))
    # The mass makes up for the rounding of lse, which is relative to the size of lse.
    assert_near(mass, y64.sum(1), LOSS_SLACK + 2.4e-7 * lse.abs().max().item())
    truth = gradients(lambda x, s: formula(x, y64, s), g64, x64, s64)
    plain = gradients(lambda x, s: formula(x, y32, s), g32, x32, s32)
    assert_near(dx, truth[0], GRAD_SLACK, plain[0])
    # Large terms of both signs: measured against their sizes, as any order of adding them is.
    size = (
        (g64[:, None] * ((s64 * x64).softmax(1) * y64.sum(1, keepdim=True) - y64) * x64).abs().sum()
    )
    assert abs(dscale.item() - truth[1].item()) <= 2e-6 * size


def logits_and_targets(n, k, dtype=torch.float32, device="cpu", targets_dtype=None):
    """Targets are no distributions: rows sum to any number, one row to 0."""
    x = randn(n, k, dtype=dtype, device=device)
    y = (2 * randn(n, k, seed=1)).softmax(1) * (1 + torch.arange(n)[:, None])
    y[n // 2] = 0
    return x, y.to(targets_dtype or dtype).to(device)


def check_masked_classes(device):
    """A logit of −∞ whose target is 0 adds nothing: as if the class were not there."""
    x, y = logits_and_targets(9, 300, device=device)
    x[:, 100:] = float("-inf")
    y[:, 100:] = 0
    x[3] = float("-inf")  # nothing left, and nothing asked for
    y[3] = 0
    scale, g = torch.tensor(2.0, device=device), randn(9, seed=9, device=device)
    loss, lse, mass = soft_cross_entropy.forward(x, y, scale)
    dx, dscale = soft_cross_entropy.backward(g, x, y, scale, lse, mass)
    assert loss[3] == 0 and lse[3] == float("-inf") and (dx[3] == 0).all()
    assert (dx[:, 100:] == 0).all()

    rows = [i for i in range(9) if i != 3]
    x64, y64, g64 = (a.cpu().double()[rows] for a in (x, y, g))
    x64, y64, s64 = x64[:, :100], y64[:, :100], scale.cpu().double()
    formula = reference_soft_cross_entropy.soft_cross_entropy
    assert_near(loss[rows], formula(x64, y64, s64), LOSS_SLACK)
    truth = gradients(lambda x, s: formula(x, y64, s), g64, x64, s64)
    assert_near(dx[rows, :100], truth[0], GRAD_SLACK)
    assert_near(dscale, truth[1], GRAD_SLACK)


def check_target_on_masked_class(device):
    """A target on a logit of −∞ costs infinitely much."""
    x, y = logits_and_targets(4, 70, device=device)
    x[1, 65] = float("-inf")
    loss, _, _ = soft_cross_entropy.forward(x, y, torch.tensor(1.0, device=device))
    assert loss[1] == float("inf") and loss[[0, 2, 3]].isfinite().all()


# ---- Sinkhorn


def check_sinkhorn(scores, epsilon, iterations=3, slack=4e-6):
    # log u has a size of about 30, which float32 holds to 2e-6.
    codes = sinkhorn.forward(scores, epsilon=epsilon, iterations=iterations)
    assert codes.dtype == torch.float32
    truth = reference_sinkhorn.sinkhorn(
        scores.cpu().double(), epsilon=epsilon, iterations=iterations
    )
    plain = reference_sinkhorn.sinkhorn(
        scores.cpu().float(), epsilon=epsilon, iterations=iterations
    )
    assert_near(codes, truth, slack, plain)


SWAV_CODES = (
    "b48_k300",
    "collapsed_b16_k100",
    "iter1_b33_k100",
    "large_b29_k300",
    "underflow_b21_k96",
)


def check_sinkhorn_golden(device):
    """SwAV's codes, also where its own float32 code returns NaN."""
    for name in SWAV_CODES:
        data = golden(f"swav_sinkhorn_{name}")
        codes = sinkhorn.forward(
            data["scores"].to(device), epsilon=data["eps"].item(), iterations=int(data["iters"])
        )
        error = (codes.cpu().double() - data["q_f64"]).abs().max()
        # Scores / ε are known to 6e-8 of their size: 131 where prototypes underflow.
        assert error < (5e-6 if "underflow" in name else 3e-7), (name, error)
    data = golden("swav_sinkhorn_dist2_b19x2_k300")
    scores = torch.cat([data["scores_rank0"], data["scores_rank1"]]).to(device)
    codes = sinkhorn.forward(scores, epsilon=data["eps"].item(), iterations=int(data["iters"]))
    assert (codes.cpu() - data["q_f64"]).abs().max() < 3e-7


def extreme_scores(n, k):
    """S/ε between −1,000 and 1,000 for ε = 0.05, some prototypes far below all others."""
    scores = (20 * randn(n, k)).clamp(-50, 50)
    scores[:, :: max(k // 5, 1)] -= 30
    return scores.clamp(-50, 50)


def check_unavailable_prototype(device):
    """A prototype whose scores are all −∞ gets codes of 0, and the others share the samples."""
    scores = randn(21, 40, device=device)
    scores[:, [0, 17, 39]] = float("-inf")
    left = [k for k in range(40) if k not in (0, 17, 39)]
    codes = sinkhorn.forward(scores, epsilon=0.5, iterations=3)
    assert (codes[:, [0, 17, 39]] == 0).all()
    truth = reference_sinkhorn.sinkhorn(scores[:, left].cpu().double(), epsilon=0.5, iterations=3)
    assert_near(codes[:, left], truth, 1e-6)


# ---- EMA

# Sizes around the vector of 8, and around a program's 4,096 elements.
EMA_SIZES = (1, 7, 8, 9, 63, 0, 4095, 4096, 4097, 8193)


def ema_truth(targets, sources, momentum):
    return [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources)]


def check_ema(targets, sources, momentum):
    before = [s.clone() for s in sources]
    truth = ema_truth(targets, sources, momentum)
    ema.update_(targets, sources, momentum=momentum)
    for target, true, source, old in zip(targets, truth, sources, before):
        assert_near(target, true, 1e-7)
        assert torch.equal(source, old)


def flat_views(sizes, dtype, device, seed, offset=0):
    """Tensors that lie in one buffer, at multiples of 16 bytes plus offset elements, with gaps.

    One buffer because ttsem knows the memory of a kernel's arguments only, and the kernel is given
    the first tensor and distances to the others.
    """
    starts = [offset + 16]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 16) * 16 + 32)
    buffer = randn(starts[-1], seed=seed, dtype=dtype, device=device)
    views = [buffer[start : start + size] for start, size in zip(starts, sizes)]
    outside = torch.ones(len(buffer), dtype=torch.bool, device=device)
    for start, size in zip(starts, sizes):
        outside[start : start + size] = False
    return buffer, views, outside


def check_ema_in_one_buffer(dtype, source_dtype, device, offset=0, momentum=0.99):
    """Every element of the tensors moves, and nothing between them."""
    buffer, targets, outside = flat_views(EMA_SIZES, dtype, device, 0, offset)
    _, sources, _ = flat_views(EMA_SIZES, source_dtype, device, 1, offset)
    between = buffer[outside].clone()
    check_ema(targets, sources, momentum)
    assert torch.equal(buffer[outside], between)


def check_ema_golden(device):
    """Six updates, compared with the float64 ones after each."""
    data = golden("ema_variants")
    targets = [data[f"k0_{i}"].clone().to(device) for i in range(3)]
    for step, momentum in enumerate(data["m"].tolist()):
        ema.update_(targets, [data[f"q_{i}"][step].to(device) for i in range(3)], momentum=momentum)
        for i, target in enumerate(targets):
            error = (target.cpu().double() - data[f"ref_{i}"][step]).abs().max()
            assert error < 1e-6, (step, i, error)


# ---- queue


def push_in_order(queue, pointer, keys):
    """One key after the other."""
    for key in keys:
        queue[pointer] = key.to(queue.dtype)
        pointer = (pointer + 1) % len(queue)
    return pointer


def check_queue(
    size, d, batches, dtype=torch.float32, keys_dtype=torch.float32, device="cpu", start=0
):
    """Pushes batches one after the other; queue and pointer equal those of single pushes."""
    features = randn(size, d, dtype=dtype, device=device)
    pointer = torch.tensor([start], device=device)
    expected, at = features.clone(), start % size
    for i, batch in enumerate(batches):
        keys = randn(batch, d, seed=1 + i, dtype=keys_dtype, device=device)
        queue.push_(features, pointer, keys)
        at = push_in_order(expected, at, keys)
        assert torch.equal(features, expected), f"after batch {i}"
        assert pointer.item() == at


def check_queue_golden(device):
    for name in ("moco_queuewrap_b7_d96_k30",):
        data = golden(name)
        features = data["queue_before"].clone().to(device)
        pointer = torch.zeros(1, dtype=torch.int64, device=device)
        for step in range(1, 7):
            queue.push_(features, pointer, data[f"s{step}_k"].to(device))
            assert pointer.item() == int(data[f"s{step}_ptr_after"])
        assert torch.equal(features.cpu(), data["queue_after"])
