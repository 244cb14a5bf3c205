"""fastcl.compat.official against what the official code computes (golden files), step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcl.compat import official

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def close(result, data, name, dtype, rtol=2e-5):
    """Against the float64 results of a file where it has them."""
    expected = data.get(f"f64_{name}", data.get(f"{name}_f64", data[name]))
    if name[:1] == "s" and f"{name[:3]}f64_{name[3:]}" in data:  # s1_f64_loss of s1_loss
        expected = data[f"{name[:3]}f64_{name[3:]}"]
    result, expected = torch.as_tensor(result).detach().double(), expected.double()
    atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(result, expected.reshape(result.shape), rtol=rtol, atol=atol)


def leaf(x, dtype):
    return x.to(dtype).requires_grad_()


@DTYPES
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", ["moco_b6_d96_k30_t02", "moco_b8_d128_k64"])
def test_moco(golden, name, transposed, dtype):
    """Queue, pointer, loss and gradient over the file's steps, in the official layout (D, K)."""
    data = golden(name)
    rows = data["queue_before"].to(dtype)
    queue = rows.clone().T if transposed else rows.T.contiguous()
    pointer = torch.zeros(1, dtype=torch.long)
    steps = sum(key.endswith("_im_q") and "grad" not in key for key in data)
    assert steps > 1
    for s in (f"s{i + 1}_" for i in range(steps)):
        x = leaf(data[s + "im_q"], dtype)
        q = nn.functional.normalize(x, dim=1)
        k = nn.functional.normalize(data[s + "im_k"].to(dtype), dim=1)
        loss = official.moco_loss(q, k, queue, float(data["param_T"]))
        official.moco_dequeue_and_enqueue_(queue, pointer, k)
        loss.backward()
        close(loss, data, s + "loss", dtype)
        close(x.grad, data, s + "grad_im_q", dtype)
        assert int(pointer) == int(data[s + "ptr_after"])
    close(queue.T, data, "queue_after", dtype)


@DTYPES
def test_moco_queue_wraps(golden, dtype):
    """Where the official code would assert, the ring goes on (CMC's MemoryMoCo)."""
    data = golden("moco_queuewrap_b7_d96_k30")
    queue, pointer = data["queue_before"].to(dtype).clone().T, torch.zeros(1, dtype=torch.long)
    for s in (f"s{i}_" for i in range(1, 7)):
        q, k = leaf(data[s + "q"], dtype), data[s + "k"].to(dtype)
        loss = official.moco_loss(q, k, queue, float(data["param_T"]))
        official.moco_dequeue_and_enqueue_(queue, pointer, k)
        loss.backward()
        close(loss, data, s + "loss", dtype)
        close(q.grad, data, s + "grad_q", dtype)
        assert int(pointer) == int(data[s + "ptr_after"])
    close(queue.T, data, "queue_after", dtype)


def test_moco_queue_of_more_keys_than_rows():
    for queue in (torch.zeros(2, 5), torch.zeros(5, 2).T):
        pointer = torch.tensor([3])
        keys = torch.arange(1.0, 15.0).reshape(7, 2)
        official.moco_dequeue_and_enqueue_(queue, pointer, keys)
        assert int(pointer) == 0
        assert queue.T.equal(keys[2:]), "the last five, where single pushes leave them"


def test_moco_momentum_update():
    torch.manual_seed(0)
    q, k = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [0.9 * b + 0.1 * a for a, b in zip(q.parameters(), k.parameters())]
    official.moco_momentum_update_(q, k, 0.9)
    for x, y in zip(k.parameters(), expected):
        torch.testing.assert_close(x.detach(), y.detach())


@DTYPES
@pytest.mark.parametrize("name", ["mocov3_loss_b24_d256_t1.0", "mocov3_loss_b50_d96_t0.2_aligned"])
def test_moco_v3(golden, name, dtype):
    data = golden(name)
    q1, q2 = leaf(data["q1"], dtype), leaf(data["q2"], dtype)
    k1, k2, T = data["k1"].to(dtype), data["k2"].to(dtype), float(data["T"])
    loss = official.moco_v3_loss(q1, k2, T) + official.moco_v3_loss(q2, k1, T)
    loss.backward()
    close(loss, data, "loss", dtype)
    close(q1.grad, data, "grad_q1", dtype)
    close(q2.grad, data, "grad_q2", dtype)


@DTYPES
@pytest.mark.parametrize(
    "name",
    ["simclr_ntxent_n3_d128_t01", "simclr_ntxent_n8_d128_t01", "simclr_ntxent_nonorm_n7_d64_t1"],
)
def test_simclr(golden, name, dtype):
    data = golden(name)
    h = leaf(data["h"], dtype)
    loss = official.simclr_loss(h, bool(data["param_hidden_norm"]), float(data["param_T"]))
    loss.backward()
    close(loss, data, "loss", dtype)
    close(h.grad, data, "grad_h", dtype)


def test_simclr_norm_of_tiny_rows():
    """rsqrt(max(sum, 1e-12)): a norm below 1e-6 is divided by 1e-6."""
    h = torch.full((4, 3), 1e-8, dtype=torch.float64).requires_grad_()
    official.simclr_loss(h).backward()
    z = (h.detach() * 1e6).chunk(2)
    import fastcl.functional as F

    expected = 2 * F.nt_xent(*z, temperature=1.0, normalize=False)
    torch.testing.assert_close(official.simclr_loss(h.detach()), expected)
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("name", ["swav_sinkhorn_b48_k300", "swav_sinkhorn_iter1_b33_k100"])
def test_swav_sinkhorn(golden, name):
    data = golden(name)
    codes = official.swav_distributed_sinkhorn(
        data["scores"], float(data["eps"]), int(data["iters"])
    )
    torch.testing.assert_close(codes, data["q_f64"].float(), rtol=1e-4, atol=1e-7)


def swav_formula(output, bs, assign, crops, temperature, queue):
    """The official loop, with its own sinkhorn."""
    loss = 0.0
    for i, crop in enumerate(assign):
        scores = output[bs * crop : bs * (crop + 1)].detach()
        if queue is not None:
            scores = torch.cat((queue[i], scores))
        q = (scores / 0.05).exp().T
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / q.shape[0]
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = (q * q.shape[1]).T[-bs:]
        sub = 0.0
        for v in range(sum(crops)):
            if v != crop:
                x = output[bs * v : bs * (v + 1)] / temperature
                sub = sub - (q * x.log_softmax(1)).sum(1).mean()
        loss = loss + sub / (sum(crops) - 1)
    return loss / len(assign)


@DTYPES
@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize(
    "assign, crops", [((0, 1), (2,)), ((0, 1), (2, 6)), ((0,), (2, 1)), ((0, 2), (3,))]
)
def test_swav(compare, draw, assign, crops, queue, dtype):
    bs, k = 7, 15
    output = draw(sum(crops) * bs, k).clamp(-1, 1)
    queues = [draw(20, k).clamp(-1, 1).to(dtype) for _ in assign] if queue else None

    def plain(x):
        return swav_formula(x, bs, assign, crops, 0.1, queues and [q.to(x.dtype) for q in queues])

    def ours(x):
        return official.swav_loss(x, bs, assign, crops, 0.1, queue_scores=queues)

    compare(plain, ours, dtype).step(lambda f, x: f(x), (output,))


def test_swav_wrong_rows():
    with pytest.raises(ValueError, match="2 crops of 4 rows; got 9 rows"):
        official.swav_loss(torch.randn(9, 3), 4)


@DTYPES
@pytest.mark.parametrize("name", ["dino_loss_b5_k300_c6_3steps", "dino_loss_b2_k3000_c4"])
def test_dino(golden, name, dtype):
    data = golden(name)
    steps, _, k = data["student"].shape
    loss = official.DINOLoss(
        k, int(data["ncrops"]), 0.04, 0.07, 4, 8,
        float(data["student_temp"]), float(data["center_momentum"]),
    ).to(dtype)  # fmt: skip
    loss.teacher_temp_schedule = data["teacher_temp_schedule"].numpy()
    if "center_init" in data:
        loss.center.copy_(data["center_init"])
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, k)
    for step in range(steps):
        student = leaf(data["student"][step], dtype)
        value = loss(student, data["teacher"][step].to(dtype), int(data["epochs"][step]))
        value.backward()
        torch.testing.assert_close(
            value.double(), data["loss_f64"][step].double(), rtol=2e-5, atol=0
        )
    torch.testing.assert_close(
        loss.center.double(), data["center_f64_last"].double(), rtol=1e-4, atol=1e-6
    )
    close(student.grad, data, "grad_student_last" if steps > 1 else "grad_student", dtype)


def test_dino_schedule():
    loss = official.DINOLoss(4, 6, 0.04, 0.07, 4, 8)
    assert loss.teacher_temp_schedule.tolist() == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07, 0.07, 0.07]
    )


@DTYPES
def test_instdisc(golden, dtype):
    data = golden("instdisc_nce_b8_d128_n200_k64")
    memory, Z = data["mem_before"].to(dtype), None
    for s in ("s1_", "s2_"):
        x, y = leaf(data[s + "x"], dtype), data[s + "y"].long()
        idx = data[s + "idx"].long()
        loss, Z = official.instdisc_loss(x, memory, idx, Z, float(data["param_T"]))
        loss.backward()
        official.instdisc_update_(memory, y, x, float(data["param_momentum"]))
        close(loss, data, s + "loss", dtype)
        close(x.grad, data, s + "grad_x", dtype)
        close(Z, data, s + "Z", dtype)
        close(memory[y], data, s + "mem_rows_after", dtype)


@DTYPES
def test_cmc(golden, dtype):
    data = golden("cmc_nce_b8_d128_n100_k48")
    memories = [data[f"mem_{view}_before"].to(dtype) for view in ("l", "ab")]
    Z = [None, None]
    for s in ("s1_", "s2_"):
        l, ab = leaf(data[s + "l"], dtype), leaf(data[s + "ab"], dtype)
        y, idx = data[s + "y"].long(), data[s + "idx"].long()
        T, momentum = float(data["param_T"]), float(data["param_momentum"])
        loss_l, loss_ab, *Z = official.cmc_loss(l, ab, *memories, idx, *Z, T)
        (loss_l + loss_ab).backward()
        for memory, x in zip(memories, (l, ab)):
            official.instdisc_update_(memory, y, x, momentum)
        close(loss_l, data, s + "loss_l", dtype)
        close(loss_ab, data, s + "loss_ab", dtype)
        close(l.grad, data, s + "grad_l", dtype)
        close(ab.grad, data, s + "grad_ab", dtype)
        for memory, view, z in zip(memories, ("l", "ab"), Z):
            close(memory[y], data, f"{s}mem_{view}_rows_after", dtype)
            close(z, data, f"{s}Z_{view}", dtype)
