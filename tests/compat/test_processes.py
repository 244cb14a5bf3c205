"""Two processes: the losses that gather give the libraries' results, without their own code."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("lightly")
pytest.importorskip("open_clip")

WORLD = 2


def work(rank: int, folder: str) -> None:
    import torch
    from lightly import loss as lightly
    from open_clip import loss as open_clip

    from fastcl.compat import _common, official
    from fastcl.compat import lightly as our_lightly
    from fastcl.compat import open_clip as our_open_clip

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )

    def compare(name, module, ours, *options, inputs=2, steps=1, **named):
        """Loss, gradients and buffers of a class of theirs and of ours over some steps.

        Of scalars (scale and bias) the gradients' mean, which is what DDP makes of them.
        """
        losses = [getattr(m, name)(*options, **named) for m in (module, ours)]
        for theirs, mine in zip(losses[0].buffers(), losses[1].buffers()):
            mine.copy_(theirs)
        for step in range(steps):
            results = []
            for loss in losses:
                torch.manual_seed(10 * step + rank)
                leaves = [torch.randn(6, 5).requires_grad_() for _ in range(2)]
                leaves += [torch.tensor(x).requires_grad_() for x in (3.0, -1.0)[: inputs - 2]]
                value = loss(*leaves)
                value.backward()
                for x in leaves[2:]:
                    torch.distributed.all_reduce(x.grad)
                results.append([value, *(x.grad for x in leaves), *loss.buffers()])
            torch.testing.assert_close(*results, msg=lambda m: f"{name}{options}{named}: {m}")

    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        compare(name, lightly, our_lightly, 0.3, gather_distributed=True)
    compare("NTXentLoss", lightly, our_lightly, 0.3, (20, 5), True, steps=4)
    compare("NTXentLoss", lightly, our_lightly, 0.3, (20, 5), False, steps=4)

    swav = [m.SwaVLoss(sinkhorn_gather_distributed=True) for m in (lightly, our_lightly)]
    torch.manual_seed(rank)
    crops = [torch.rand(7, 9) for _ in range(3)]
    torch.testing.assert_close(*(loss(crops[:2], crops[2:]) for loss in swav))

    dino = [m.DINOLoss(9) for m in (lightly, our_lightly)]
    for _ in range(3):
        torch.testing.assert_close(*(loss(crops[:2], crops) for loss in dino))
    torch.testing.assert_close(dino[1].center, dino[0].center)

    world = {"rank": rank, "world_size": WORLD}
    for local in (True, False):
        for grad in (True, False):
            compare("ClipLoss", open_clip, our_open_clip, local, grad, inputs=3, **world)
    for way in ("bidir", "shift", "reduce", "gather"):
        compare("SigLipLoss", open_clip, our_open_clip, inputs=4, dist_impl=way, **world)
    assert _common.say_once.cache_info().currsize == 0, "a library's own code ran"

    compare("NTXentLoss", lightly, our_lightly, -0.3, gather_distributed=True)
    assert _common.say_once.cache_info().currsize == 1

    group = torch.distributed.group.WORLD
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(2, 10, 4, generator=generator)  # two views of ten images
    mine = whole[:, 5 * rank : 5 * rank + 5]
    for name, one, all_of_them in (
        (
            "moco-v3",
            official.moco_v3_loss(*mine, 0.4, group=group),
            official.moco_v3_loss(*whole, 0.4),
        ),
        (
            "simclr",
            official.simclr_loss(mine.flatten(0, 1), group=group),
            official.simclr_loss(whole.flatten(0, 1)),
        ),
        (
            "swav",
            official.swav_loss(mine.flatten(0, 1), 5, group=group),
            official.swav_loss(whole.flatten(0, 1), 10),
        ),
    ):
        torch.distributed.all_reduce(one)
        torch.testing.assert_close(
            one / WORLD, all_of_them, msg=lambda m, name=name: f"{name}: {m}"
        )
    codes = official.swav_distributed_sinkhorn(mine[0], group=group)
    expected = official.swav_distributed_sinkhorn(whole[0])[5 * rank : 5 * rank + 5]
    torch.testing.assert_close(codes, expected)
    torch.distributed.destroy_process_group()  # before the exit, which can abort its threads
    Path(folder, f"done{rank}").touch()


def test_two_processes():
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(rank), folder],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(WORLD)
        ]
        try:
            errors = [process.communicate(timeout=120)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(errors)
        assert len(list(Path(folder).glob("done*"))) == WORLD


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
