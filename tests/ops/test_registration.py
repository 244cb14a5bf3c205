"""Every registered operation is one that torch accepts: schema, fake kernel, autograd, compile."""

from __future__ import annotations

import pytest
import torch

import fastcl.functional as F
from fastcl.ops import OPS
from fastcl.testing import sample_inputs

CASES = [
    pytest.param(word, i, dtype, id=f"{word}-{i}-{str(dtype).removeprefix('torch.')}")
    for word in OPS
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for i in range(len(sample_inputs(word)))
]


@pytest.mark.parametrize(("word", "i", "dtype"), CASES)
def test_opcheck(word: str, i: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS[word][0].overload, sample_inputs(word, dtype=dtype)[i])


def test_opcheck_without_key_gradient() -> None:
    query, key, scale, *_ = sample_inputs("similarity_lse")[0]
    torch.library.opcheck(
        OPS["similarity_lse"][1].overload, (query, key.detach(), scale, None, None, True)
    )


def test_every_operation_has_a_file_in_every_layer() -> None:
    from pathlib import Path

    root = Path(__file__).parents[2]
    for word in OPS:
        for path in (
            f"kernels/{word}.py",
            f"csrc/{word}.cpp",
            f"fastcl/reference/{word}.py",
            f"fastcl/ops/{word}.py",
            f"tests/ops/test_{word}.py",
            f"bench/bench_{word}.py",
        ):
            assert (root / path).exists(), path


def test_compiled_loss_does_not_recompile_over_varying_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: F.nt_xent(x, y) + F.clip(x, y, logit_scale=10.0) + F.negative_cosine(x, y),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    counters = torch._dynamo.utils.counters
    counters.clear()
    for n in (5, 8, 13, 64):
        x, y = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
        loss = compiled(x, y)
        plain = F.nt_xent(x, y) + F.clip(x, y, logit_scale=10.0) + F.negative_cosine(x, y)
        torch.testing.assert_close(loss, plain)
        grads = torch.autograd.grad(loss, (x, y))
        torch.testing.assert_close(grads, torch.autograd.grad(plain, (x, y)))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.nt_xent(x, y),
        lambda x, y: F.info_nce(x, y),
        lambda x, y: F.info_nce(x, y, y.detach()),
        lambda x, y: F.negative_cosine(x, y),
        lambda x, y: F.soft_cross_entropy(x, y.detach().softmax(1)),
    ],
    ids=["nt_xent", "info_nce", "info_nce-queue", "negative_cosine", "soft_cross_entropy"],
)
def test_second_derivative_raises(loss) -> None:  # type: ignore[no-untyped-def]
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    with pytest.raises(NotImplementedError, match="second derivative"):
        (grad,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        grad.sum().backward()


def test_in_place_operations_are_seen_by_autograd() -> None:
    queue = torch.randn(4, 3)
    x = torch.randn(2, 3, requires_grad=True)
    product = (x @ queue.T).sum()  # saves queue
    F.queue_push_(queue, torch.zeros(1, dtype=torch.int64), torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
