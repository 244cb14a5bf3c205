"""What users of torch do around a loss: autocast, compile, checkpoint, torch.func, determinism."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastcl.functional as F

Loss = Callable[[Tensor, Tensor], Tensor]

QUEUE = torch.nn.functional.normalize(torch.randn(9, 8))
LABELS = torch.tensor([0, 1, 0, 2, 1, 3])
INDEX = torch.tensor([[0, 3, 3], [1, 2, 8], [4, 4, 4], [5, 6, 7], [8, 0, 1], [2, 3, 4]])

# Every differentiable function of the public API, of x and y (6, 8).
LOSSES: dict[str, Loss] = {
    "similarity_lse": lambda x, y: sum(F.similarity_lse(x, y, scale=3.0, reduce="both")),
    "self_similarity_lse": lambda x, y: F.self_similarity_lse(x * y, normalize=True),
    "info_nce": lambda x, y: F.info_nce(x, y, temperature=0.2),
    "info_nce-shared": lambda x, y: F.info_nce(x, y, QUEUE.to(x.dtype), temperature=0.2),
    "info_nce-own": lambda x, y: F.info_nce(x, y, y[INDEX % 6], temperature=0.2),
    "nt_xent": lambda x, y: F.nt_xent(x, y, reduction="none"),
    "dcl": lambda x, y: F.dcl(x, y),
    "clip": lambda x, y: F.clip(x, y, logit_scale=4.0),
    "siglip": lambda x, y: F.siglip(x, y, logit_scale=4.0, logit_bias=-2.0),
    "siglip-rows": lambda x, y: F.siglip(x, y, logit_scale=4.0, logit_bias=-2.0, reduction="none"),
    "sup_con": lambda x, y: F.sup_con(x + y, LABELS),
    "instance_spread": lambda x, y: F.instance_spread(x, y, detach_columns=False),
    "bank_scores": lambda x, y: F.bank_scores(x + y, QUEUE.to(x.dtype), INDEX),
    "nce": lambda x, y: F.nce(x + y, data_size=50, partition=20.0),
    "soft_cross_entropy": lambda x, y: F.soft_cross_entropy(x + y, QUEUE[:6].to(x).softmax(1)),
    "self_distillation": lambda x, y: F.self_distillation(
        torch.stack((x, y)), QUEUE.to(x).view(1, 9, 8)[:, :6], center=QUEUE[6].to(x)
    ),
    "negative_cosine": lambda x, y: F.negative_cosine(x, y),
}
over_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def views(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


@over_losses
def test_gradcheck_of_the_reference(loss: Loss) -> None:
    """float64 runs the reference, with the backward formulas that the kernels follow."""
    assert torch.autograd.gradcheck(loss, views(torch.float64))


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "logit_bias"])
def test_gradcheck_of_learnable_scalars(name: str) -> None:
    x, y = views(torch.float64)
    value = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    losses = {
        "temperature": lambda t: torch.stack(
            [
                F.nt_xent(x, y, temperature=t),
                F.info_nce(x, y, temperature=t),
                F.info_nce(x, y.detach(), QUEUE.double(), temperature=t),
                F.dcl(x, y, temperature=t),
                F.sup_con(x, LABELS, temperature=t, base_temperature=0.3),
                F.instance_spread(x, y, temperature=t),
                F.soft_cross_entropy(x, y.detach().softmax(1), temperature=t),
            ]
        ),
        "logit_scale": lambda t: (
            F.clip(x, y, logit_scale=t) + F.siglip(x, y, logit_scale=t, logit_bias=-1.0)
        ),
        "logit_bias": lambda b: F.siglip(x, y, logit_scale=2.0, logit_bias=b),
    }
    assert torch.autograd.gradcheck(losses[name], value)


@over_losses
def test_compiles_in_one_graph_for_any_number_of_rows(loss: Loss) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for _ in range(2):
        x, y = views()
        torch.testing.assert_close(compiled(x, y), loss(x, y))
        compiled(x, y).sum().backward()
        a, b = views()
        loss(a, b).sum().backward()
        torch.testing.assert_close((x.grad, y.grad), (a.grad, b.grad))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@over_losses
def test_autocast_changes_nothing_but_what_comes_in(loss: Loss) -> None:
    """Under autocast a loss takes what the encoder made, and returns float32."""
    x, y = views(torch.bfloat16)
    expected = loss(x, y)
    gradients = torch.autograd.grad(expected.sum(), (x, y), allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(x, y)
    assert under.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(under, expected)
    torch.testing.assert_close(
        torch.autograd.grad(under.sum(), (x, y), allow_unused=True), gradients
    )


@over_losses
def test_autocast_takes_what_an_encoder_gives(loss: Loss) -> None:
    encoder = torch.nn.Linear(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = encoder(torch.randn(6, 5)), encoder(torch.randn(6, 5))
        assert x.dtype == torch.bfloat16
        loss(x, y).sum().backward()
    assert encoder.weight.grad.dtype == torch.float32
    assert encoder.weight.grad.isfinite().all() and encoder.weight.grad.any()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@over_losses
def test_deterministic_mode_accepts_every_loss(loss: Loss, deterministic: None) -> None:
    runs = []
    for _ in range(2):
        x, y = views()
        value = loss(x, y)
        runs.append([value.detach(), *torch.autograd.grad(value.sum(), (x, y), allow_unused=True)])
    assert all(map(torch.equal, *(filter(lambda t: t is not None, run) for run in runs)))


@over_losses
def test_second_derivative_raises_only_when_it_is_taken(loss: Loss) -> None:
    x, y = views()
    (gradient,) = torch.autograd.grad(loss(x, y).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(loss(x, y).sum(), x)
    assert torch.equal(gradient, expected)
    if loss in (LOSSES["nce"], LOSSES["info_nce-own"], LOSSES["bank_scores"]):
        return  # plain torch, which has one; linear in the query, so that there is none
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.square().sum().backward()


def test_forward_mode_raises() -> None:
    x, y = views()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda a: F.nt_xent(a, y.detach()), (x.detach(),), (x.detach(),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(NotImplementedError, match="forward-mode"):
            F.negative_cosine(dual, y.detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@over_losses
def test_torch_func_grad_and_vmap_give_what_a_loop_gives(loss: Loss) -> None:
    pairs = [torch.stack([v.detach(), v.detach().flip(0), -v.detach()]) for v in views()]

    def value(x: Tensor, y: Tensor) -> Tensor:
        return loss(x, y).sum()

    gradients = torch.func.vmap(torch.func.grad(value))(*pairs)
    for gradient, x, y in zip(gradients, *pairs):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(value(x, y), x)[0])


@over_losses
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(loss: Loss, reentrant: bool) -> None:
    x, y = views()
    expected = torch.autograd.grad(loss(x, y).sum(), (x, y), allow_unused=True)
    checkpoint(loss, x, y, use_reentrant=reentrant).sum().backward()
    for leaf, gradient in zip((x, y), expected):
        if gradient is not None:
            torch.testing.assert_close(leaf.grad, gradient)


@over_losses
def test_exported_and_traced_losses_give_what_the_real_one_gives(loss: Loss) -> None:
    x, y = (v.detach() for v in views())
    expected = loss(x, y)
    exported = torch.export.export(Module(loss), (x, y)).module()
    torch.testing.assert_close(exported(x, y), expected)
    graph = torch.fx.experimental.proxy_tensor.make_fx(loss, tracing_mode="real")(x, y)
    torch.testing.assert_close(graph(x, y), expected)


def test_profilers_show_the_operations_by_name() -> None:
    x, y = views()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = torch.autograd.grad(LOSSES["nt_xent"](x, y).sum(), (x, y))
    names = {event.key for event in profile.key_averages()}
    assert {"fastcl::self_similarity_lse", "fastcl::self_similarity_lse_backward"} <= names
    assert {"fastcl::cosine", "fastcl::cosine_backward"} <= names
    expected = torch.autograd.grad(LOSSES["nt_xent"](x, y).sum(), (x, y))
    assert all(map(torch.equal, profiled, expected))


class Module(torch.nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


def test_what_a_loss_saves_grows_with_the_rows_only() -> None:
    """Saved tensors of a loss of 4n rows hold four times what n rows' do, not sixteen times."""

    def saved(n: int) -> dict[str, int]:
        sizes = {}
        for name in (
            "nt_xent",
            "info_nce",
            "info_nce-shared",
            "dcl",
            "clip",
            "siglip",
            "instance_spread",
        ):
            total = 0

            def count(x: Tensor) -> Tensor:
                nonlocal total
                total += x.untyped_storage().nbytes()
                return x

            x, y = (torch.randn(n, 8, requires_grad=True) for _ in range(2))
            with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                LOSSES[name](x, y)
            sizes[name] = total
        return sizes

    small, large = saved(64), saved(256)
    for name in small:
        assert 0 < large[name] <= 4.5 * small[name], (name, small[name], large[name])
