"""Numbers below 2^-126 count as zero in the kernels, and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl.functional as F

pytestmark = pytest.mark.usefixtures("kernels")

LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "nt_xent": lambda x, y, t: F.nt_xent(x, y, temperature=t),
    "clip": lambda x, y, t: F.clip(x, y, logit_scale=1 / t),
    "sup_con": lambda x, y, t: F.sup_con(x, torch.arange(len(x)) // 8, temperature=t),
    "instance_spread": lambda x, y, t: F.instance_spread(x, y, temperature=t),
    "soft_cross_entropy": lambda x, y, t: F.soft_cross_entropy(
        x, y.detach().softmax(1), temperature=t
    ),
    "sinkhorn": lambda x, y, t: (F.sinkhorn(x / 10, epsilon=t).detach() * x).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_steep_softmax_takes_as_long_as_another(name: str) -> None:
    """Probabilities of 1e-40 took a hundred times as long on processors that trap them."""
    torch.manual_seed(0)
    x = torch.randn(768, 64, requires_grad=True)
    y = (x.detach() + torch.randn(768, 64)).requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best: dict[float, float] = {0.2: float("inf"), 0.01: float("inf"), 0.005: float("inf")}
    try:
        for _ in range(5):
            for temperature in best:
                before = time.process_time()
                LOSSES[name](x, y, temperature).backward()
                best[temperature] = min(best[temperature], time.process_time() - before)
    finally:
        torch.set_num_threads(threads)
    assert max(best[0.01], best[0.005]) < 5 * best[0.2] + 1e-3


def test_torchs_own_subnormals_are_left_alone() -> None:
    tiny = torch.full((1 << 20,), 1e-40)  # for all threads of the pool
    x, y = torch.randn(2, 512, 64, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for loss in LOSSES.values():
            loss(x, y, 0.1).backward()
            assert (tiny * 0.5).all()
    finally:
        torch.set_num_threads(threads)
