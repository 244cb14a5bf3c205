"""fastcl.functional against the official implementations' outputs, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as N

import fastcl
import fastcl.functional as F
from fastcl.testing import assert_as_accurate_as, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

LOSS = dict(rtol=1e-6, atol=2e-7)


def assert_gradient(actual: torch.Tensor, truth: torch.Tensor, slack: float = 1e-5) -> None:
    scale = truth.abs().max().item()
    torch.testing.assert_close(actual.double(), truth.double(), rtol=0, atol=slack * scale)


# ---- golden vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n3_d128_t01", "n8_d128_t01", "nonorm_n7_d64_t1"])
def test_nt_xent_is_simclr(golden, name: str) -> None:
    file = golden(f"simclr_ntxent_{name}")
    h = file["h"].requires_grad_()
    z0, z1 = h.chunk(2)
    normalize = bool(file["param_hidden_norm"])
    options = dict(temperature=float(file["param_T"]), normalize=normalize)
    loss = F.nt_xent(z0, z1, **options)
    torch.testing.assert_close(2 * loss.double(), file["f64_loss"].double(), **LOSS)
    (2 * loss).backward()
    assert_gradient(h.grad, file["f64_grad_h"])
    rows = F.nt_xent(z0, z1, reduction="none", **options)
    torch.testing.assert_close(rows.double(), file["f64_per_row"], **LOSS)


@pytest.mark.parametrize("name", ["b6_d96_k30_t02", "b8_d128_k64"])
def test_info_nce_with_a_queue_is_moco(golden, name: str) -> None:
    file = golden(f"moco_{name}")
    queue, pointer = file["queue_before"].clone(), torch.zeros(1, dtype=torch.int64)
    temperature = float(file["param_T"])
    steps = sum(key.endswith("_ptr_after") for key in file)
    assert steps >= 3
    for step in range(1, steps + 1):
        query = file[f"s{step}_im_q"].requires_grad_()
        key = file[f"s{step}_im_k"]
        loss = F.info_nce(query, key, queue, temperature=temperature)
        torch.testing.assert_close(loss.double(), file[f"s{step}_f64_loss"], **LOSS)
        loss.backward()
        assert_gradient(query.grad, file[f"s{step}_f64_grad_im_q"])
        F.queue_push_(queue, pointer, N.normalize(key))
        assert pointer.item() == file[f"s{step}_ptr_after"]
    torch.testing.assert_close(queue.double(), file["f64_queue_after"], rtol=0, atol=1e-6)


def test_queue_wraps_around_inside_a_batch(golden) -> None:
    file = golden("moco_queuewrap_b7_d96_k30")
    queue, pointer = file["queue_before"].clone(), torch.zeros(1, dtype=torch.int64)
    for step in range(1, 7):
        query = file[f"s{step}_q"].requires_grad_()
        loss = F.info_nce(
            query, file[f"s{step}_k"], queue, temperature=float(file["param_T"]), normalize=False
        )
        torch.testing.assert_close(loss.double(), file[f"s{step}_f64_loss"], **LOSS)
        loss.backward()
        assert_gradient(query.grad, file[f"s{step}_f64_grad_q"])
        F.queue_push_(queue, pointer, file[f"s{step}_k"])
        assert pointer.item() == file[f"s{step}_ptr_after"]
    torch.testing.assert_close(queue, file["queue_after"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["b24_d256_t1.0", "b50_d96_t0.2_aligned"])
def test_info_nce_with_detached_keys_is_moco_v3(golden, name: str) -> None:
    file = golden(f"mocov3_loss_{name}")
    q1, q2 = file["q1"].requires_grad_(), file["q2"].requires_grad_()
    t = float(file["T"])
    loss = 2 * t * F.info_nce(q1, file["k2"], temperature=t)
    loss = loss + 2 * t * F.info_nce(q2, file["k1"], temperature=t)
    torch.testing.assert_close(loss.double(), file["loss_f64"], **LOSS)
    loss.backward()
    assert_gradient(q1.grad, file["grad_q1_f64"])
    assert_gradient(q2.grad, file["grad_q2_f64"])


@pytest.mark.parametrize("name", ["b19_d256", "degenerate_b10_d96"])
def test_negative_cosine_is_byol(golden, name: str) -> None:
    file = golden(f"byol_loss_{name}")
    p1, p2 = file["p1"].requires_grad_(), file["p2"].requires_grad_()
    loss = 4 + 2 * F.negative_cosine(p1, file["z2"], eps=1e-6)
    loss = loss + 2 * F.negative_cosine(p2, file["z1"], eps=1e-6)
    loss.backward()
    # 2 − 2 cos is ‖p̃ − z̃‖² only for rows above the norm's floor: ‖p̃‖ < 1 below it.
    whole = p1.norm(dim=1) > 1e-6
    if whole.all():
        torch.testing.assert_close(loss.double(), file["loss_f64"], **LOSS)
    assert whole.sum() >= len(whole) - 2
    assert_gradient(p1.grad[whole], file["grad_p1_f64"][whole])
    assert_gradient(p2.grad, file["grad_p2_f64"])


@pytest.mark.parametrize("name", ["b3_d2048", "degenerate_b12_d96"])
def test_negative_cosine_is_simsiam(golden, name: str) -> None:
    file = golden(f"simsiam_loss_{name}")
    p1, p2 = file["p1"].requires_grad_(), file["p2"].requires_grad_()
    loss = (F.negative_cosine(p1, file["z2"]) + F.negative_cosine(p2, file["z1"])) / 2
    torch.testing.assert_close(loss.double(), file["loss_f64"], **LOSS)
    loss.backward()
    assert_gradient(p1.grad, file["grad_p1_f64"])
    assert_gradient(p2.grad, file["grad_p2_f64"])


@pytest.mark.parametrize(
    "name",
    ["b48_k300", "collapsed_b16_k100", "iter1_b33_k100", "large_b29_k300", "underflow_b21_k96"],
)
def test_sinkhorn_is_swav(golden, name: str) -> None:
    file = golden(f"swav_sinkhorn_{name}")
    codes = F.sinkhorn(file["scores"], epsilon=float(file["eps"]), iterations=int(file["iters"]))
    torch.testing.assert_close(codes.double(), file["q_f64"], rtol=2e-5, atol=1e-6)


# ---- against plain PyTorch in float64 ------------------------------------------------------------


def plain_nt_xent(z0, z1, t):  # type: ignore[no-untyped-def]
    z = N.normalize(torch.cat((z0, z1)))
    n = len(z0)
    s = (z @ z.T / t).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return N.cross_entropy(s, torch.arange(2 * n).roll(n))


def plain_clip(x, y, t):  # type: ignore[no-untyped-def]
    s = N.normalize(x) @ N.normalize(y).T / t
    labels = torch.arange(len(x))
    return (N.cross_entropy(s, labels) + N.cross_entropy(s.T, labels)) / 2


def plain_info_nce(q, p, t):  # type: ignore[no-untyped-def]
    return N.cross_entropy(N.normalize(q) @ N.normalize(p).T / t, torch.arange(len(q)))


def plain_dcl(z0, z1, t):  # type: ignore[no-untyped-def]
    n = len(z0)
    z = N.normalize(torch.cat((z0, z1)))
    image = torch.arange(n).repeat(2)
    s = z @ z.T / t
    negatives = s.masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    return (negatives - s[torch.arange(2 * n), torch.arange(2 * n).roll(n)]).mean()


LOSSES = {
    "nt_xent": (lambda x, y, t: F.nt_xent(x, y, temperature=t), plain_nt_xent),
    "clip": (lambda x, y, t: F.clip(x, y, logit_scale=1 / t), plain_clip),
    "info_nce": (lambda x, y, t: F.info_nce(x, y, temperature=t), plain_info_nce),
    "dcl": (lambda x, y, t: F.dcl(x, y, temperature=t), plain_dcl),
}


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_as_accurate_as_plain_pytorch(loss: str, dtype: torch.dtype, temperature: float) -> None:
    fused, plain = LOSSES[loss]
    torch.manual_seed(1)
    x = torch.randn(67, 100).to(dtype)
    y = (x.float() + torch.randn(67, 100)).to(dtype)
    t = torch.tensor(temperature)
    ours = value_and_gradients(fused, (x, y, t))
    naive = value_and_gradients(lambda *a: plain(*a).float(), (x, y, t))
    truth = value_and_gradients(plain, (x.double(), y.double(), t.double()))
    slacks = (2e-6, 1e-5, 1e-5, 1e-5)
    for name, a, b, c, slack in zip(("loss", "dx", "dy", "dt"), ours, naive, truth, slacks):
        assert_as_accurate_as(a, b, c, slack=slack, name=name)


def test_unnormalised_rows_of_norm_100_do_not_overflow() -> None:
    x, y = 10 * torch.randn(33, 100), 10 * torch.randn(33, 100)
    ours = value_and_gradients(lambda *a: F.info_nce(*a, temperature=1.0, normalize=False), (x, y))

    def plain(q, p):  # type: ignore[no-untyped-def]
        return N.cross_entropy(q @ p.T, torch.arange(len(q)))

    truth = value_and_gradients(plain, (x.double(), y.double()))
    naive = value_and_gradients(plain, (x, y))
    for a, b, c in zip(ours, naive, truth):
        assert_as_accurate_as(a, b, c, slack=1e-5)


def test_learnable_temperature_of_sup_con() -> None:
    features = torch.randn(20, 8)
    labels = torch.randint(0, 4, (20,))

    def plain(z, t):  # type: ignore[no-untyped-def]
        z = N.normalize(z)
        itself = torch.eye(len(z), dtype=torch.bool)
        log_p = (z @ z.T / t).masked_fill(itself, -torch.inf).log_softmax(1)
        positive = (labels[:, None] == labels) & ~itself
        return -(torch.where(positive, log_p, 0.0).sum(1) / positive.sum(1).clamp_min(1)).mean()

    t = torch.tensor(0.2)
    ours = value_and_gradients(lambda z, t: F.sup_con(z, labels, temperature=t), (features, t))
    truth = value_and_gradients(plain, (features.double(), t.double()))
    for a, b in zip(ours, truth):
        assert_gradient(a, b)


def test_sup_con_counts_rows_without_a_positive_as_zero() -> None:
    features = torch.randn(5, 8, requires_grad=True)
    labels = torch.tensor([3, 9, 3, -4, 7])
    rows = F.sup_con(features, labels, reduction="none")
    assert (rows[[1, 3, 4]] == 0).all() and (rows[[0, 2]] > 0).all()
    torch.testing.assert_close(F.sup_con(features, labels), rows.sum() / 5)
    F.sup_con(features, torch.arange(5)).backward()
    assert (features.grad == 0).all()


def test_sup_con_base_temperature_scales_the_loss() -> None:
    features, labels = torch.randn(12, 8), torch.randint(0, 3, (12,))
    plain = F.sup_con(features, labels, temperature=0.1)
    scaled = F.sup_con(features, labels, temperature=0.1, base_temperature=0.07)
    torch.testing.assert_close(scaled, plain * 0.1 / 0.07)


def test_own_negatives_equal_shared_negatives_when_they_are_the_same() -> None:
    query, positive, negatives = torch.randn(7, 16), torch.randn(7, 16), torch.randn(11, 16)
    shared = value_and_gradients(F.info_nce, (query, positive, negatives))
    own = value_and_gradients(
        lambda q, p, k: F.info_nce(q, p, k.expand(7, 11, 16)), (query, positive, negatives)
    )
    for a, b in zip(shared, own):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_key_gradient_gives_the_same_query_gradient() -> None:
    query, key, scale = torch.randn(9, 12), torch.randn(31, 12), torch.tensor(7.0)
    weights = torch.randn(9)

    def rows(q, t, k):  # type: ignore[no-untyped-def]
        return F.similarity_lse(q, k, scale=t, normalize=True)

    both = value_and_gradients(rows, (query, scale, key), weights)
    query_only = value_and_gradients(lambda q, t: rows(q, t, key), (query, scale), weights)
    for a, b in zip(query_only, both):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 63])
def test_identical_embeddings_give_the_log_of_the_candidates(n: int) -> None:
    x = torch.ones(n, 5)
    assert F.info_nce(x, x).item() == pytest.approx(math.log(n), abs=1e-5)
    assert F.nt_xent(x, x).item() == pytest.approx(math.log(2 * n - 1), abs=1e-5)
    assert F.clip(x, x, logit_scale=10.0).item() == pytest.approx(math.log(n), abs=1e-5)
    queue = torch.ones(40, 5)
    assert F.info_nce(x, x, queue).item() == pytest.approx(math.log(41), abs=1e-5)


def test_a_row_with_nothing_left_is_minus_infinity_with_zero_gradient() -> None:
    query = torch.randn(3, 4, requires_grad=True)
    key = torch.randn(2, 4, requires_grad=True)
    lse = F.similarity_lse(
        query, key, query_ids=torch.tensor([1, 2, 1]), key_ids=torch.tensor([1, 1])
    )
    assert lse[0] == lse[2] == -math.inf and lse[1].isfinite()
    grads = torch.autograd.grad(lse, (query, key), torch.ones(3))
    assert (grads[0][[0, 2]] == 0).all() and all(g.isfinite().all() for g in grads)


def test_no_candidates_at_all() -> None:
    query = torch.randn(3, 4, requires_grad=True)
    assert (F.similarity_lse(query, torch.empty(0, 4)) == -math.inf).all()
    loss = F.info_nce(query, torch.randn(3, 4), torch.empty(0, 4))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert query.grad.abs().max() < 1e-6


def test_a_zero_row_is_finite() -> None:
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    x[2] = 0
    loss, dx, dy = value_and_gradients(F.nt_xent, (x, y))
    assert loss.isfinite() and dx.isfinite().all() and dy.isfinite().all()


def test_broken_input_stays_visible() -> None:
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    x[3, 4] = math.nan
    assert F.nt_xent(x, y).isnan()
    assert F.info_nce(x, y, torch.randn(50, 8)).isnan()
    assert F.negative_cosine(x, y).isnan()
    assert F.soft_cross_entropy(x, y.softmax(1)).isnan()


def test_reductions_agree() -> None:
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    losses = [
        lambda r: F.nt_xent(x, y, reduction=r),
        lambda r: F.dcl(x, y, reduction=r),
        lambda r: F.info_nce(x, y, reduction=r),
        lambda r: F.clip(x, y, logit_scale=5.0, reduction=r),
        lambda r: F.sup_con(x, torch.tensor([0, 0, 1, 1, 2, 2]), reduction=r),
        lambda r: F.negative_cosine(x, y, reduction=r),
        lambda r: F.soft_cross_entropy(x, y.softmax(1), reduction=r),
    ]
    for loss in losses:
        rows = loss("none")
        assert rows.ndim == 1
        torch.testing.assert_close(loss("mean"), rows.mean())
        torch.testing.assert_close(loss("sum"), rows.sum())


def test_inputs_of_mixed_precision_promote() -> None:
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    mixed = F.nt_xent(x.bfloat16(), y)
    torch.testing.assert_close(mixed, F.nt_xent(x.bfloat16().float(), y))
    assert mixed.dtype == torch.float32


def test_strided_and_expanded_inputs() -> None:
    x, y = torch.randn(8, 6).t(), torch.randn(6, 16)[:, ::2]
    torch.testing.assert_close(F.clip(x, y, logit_scale=5.0), plain_clip(x, y, 0.2))
    row = torch.randn(1, 8).expand(6, 8)
    torch.testing.assert_close(F.info_nce(row, y, temperature=0.2), plain_info_nce(row, y, 0.2))


def test_inputs_are_never_modified() -> None:
    x, y, queue = torch.randn(6, 8), torch.randn(6, 8), torch.randn(9, 8)
    before = [t.clone() for t in (x, y, queue)]
    F.nt_xent(x, y), F.info_nce(x, y, queue), F.clip(x, y, logit_scale=3.0), F.sinkhorn(x)
    for a, b in zip((x, y, queue), before):
        assert torch.equal(a, b)


# ---- errors --------------------------------------------------------------------------------------

X, Y = torch.randn(6, 8), torch.randn(6, 8)
BAD = {
    "rows": (lambda: F.nt_xent(X, Y[:5]), ValueError, r"z0 and z1 must both be \(N, D\)"),
    "features": (lambda: F.info_nce(X, Y, Y[:, :5]), ValueError, r"\(K, 8\) or \(6, K, 8\)"),
    "dimensions": (lambda: F.clip(X[0], Y[0], logit_scale=1.0), ValueError, "image must be"),
    "integer": (lambda: F.nt_xent(X.long(), Y.long()), TypeError, "floating point"),
    "empty": (lambda: F.nt_xent(X[:0], Y[:0]), ValueError, "empty"),
    "zero temperature": (lambda: F.nt_xent(X, Y, temperature=0.0), ValueError, "above 0"),
    "negative temperature": (lambda: F.dcl(X, Y, temperature=-1.0), ValueError, "above 0"),
    "nan temperature": (lambda: F.info_nce(X, Y, temperature=math.nan), ValueError, "got nan"),
    "tensor temperature": (
        lambda: F.nt_xent(X, Y, temperature=torch.tensor(0.0)),
        ValueError,
        "above 0",
    ),
    "vector temperature": (
        lambda: F.nt_xent(X, Y, temperature=torch.ones(1)),
        ValueError,
        "0-dim tensor",
    ),
    "text temperature": (lambda: F.nt_xent(X, Y, temperature="0.1"), TypeError, "got str"),
    "logit scale": (lambda: F.clip(X, Y, logit_scale=-2.0), ValueError, "logit_scale"),
    "reduction": (lambda: F.nt_xent(X, Y, reduction="avg"), ValueError, "mean, sum, none"),
    "reduce": (lambda: F.similarity_lse(X, Y, reduce="row"), ValueError, "rows, columns, both"),
    "one id vector": (
        lambda: F.similarity_lse(X, Y, query_ids=torch.arange(6)),
        ValueError,
        "go together",
    ),
    "ids length": (lambda: F.self_similarity_lse(X, ids=torch.arange(5)), ValueError, r"\(6,\)"),
    "ids dtype": (lambda: F.self_similarity_lse(X, ids=torch.rand(6)), TypeError, "integers"),
    "labels": (lambda: F.sup_con(X, torch.arange(7)), ValueError, r"labels must be \(6,\)"),
    "dcl of one": (lambda: F.dcl(X[:1], Y[:1]), ValueError, "at least 2"),
    "iterations": (lambda: F.sinkhorn(X, iterations=0), ValueError, "at least 1"),
    "epsilon": (lambda: F.sinkhorn(X, epsilon=0.0), ValueError, "epsilon"),
    "target gradient": (
        lambda: F.soft_cross_entropy(X, Y.clone().requires_grad_()),
        ValueError,
        "detach",
    ),
    "not a tensor": (lambda: F.nt_xent([1.0], Y), TypeError, "z0 must be a tensor"),
    "device": (lambda: F.nt_xent(X, Y.to("meta")), ValueError, "one device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_say_what_must_hold(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


IN_PLACE = {
    "momentum": (lambda q, p, k: F.ema_update_([q], [k], momentum=1.5), ValueError, "0 and 1"),
    "nan momentum": (lambda q, p, k: F.ema_update_([q], [k], momentum=math.nan), ValueError, "nan"),
    "counts": (lambda q, p, k: F.ema_update_([q, q], [k], momentum=0.5), ValueError, "2 and 1"),
    "shapes": (lambda q, p, k: F.ema_update_([q, q], [q, k], momentum=0.5), ValueError, r"\[1\]"),
    "width": (lambda q, p, k: F.queue_push_(q, p, k[:, :2]), ValueError, "feature size"),
    "pointer": (lambda q, p, k: F.queue_push_(q, p.float(), k), TypeError, "int64"),
    "pointer shape": (lambda q, p, k: F.queue_push_(q, p[0], k), ValueError, r"\(1,\)"),
    "no queue": (lambda q, p, k: F.queue_push_(q[:0], p, k), ValueError, "empty"),
    "strided queue": (lambda q, p, k: F.queue_push_(q.t(), p, k.t()[:, :4]), ValueError, "contig"),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_refused_update_changes_nothing(case: str) -> None:
    queue, pointer, keys = torch.randn(4, 3), torch.tensor([2]), torch.randn(5, 3)
    before = queue.clone()
    call, error, message = IN_PLACE[case]
    with pytest.raises(error, match=message):
        call(queue, pointer, keys)
    assert torch.equal(queue, before) and pointer.item() == 2


def test_backend_of_says_which_and_why(backend: str) -> None:
    assert fastcl.backend_of(X).name == backend
    assert fastcl.backend_of(X).reason
    assert fastcl.backend_of(X.double()).name == "reference"


def test_unknown_backend_lists_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "cuda")
    with pytest.raises(ValueError, match="auto, cpp, triton, reference"):
        F.nt_xent(X, Y)
