"""LARS in its published forms, and the learning-rate schedules of the fourteen methods.

"LARS" names several different updates. With learning rate lr, momentum μ, weight decay λ and trust
η, for each tensor w with gradient g:

    norm of the sum    u = g + λ w;  u ← u · η ‖w‖ / ‖u‖               SimCLR, BYOL, MoCo v3, DINO
    sum of the norms   u = (g + λ w) · η ‖w‖ / (‖g‖ + λ ‖w‖ + ε)       apex LARC: SwAV

    lr outside         v ← μ v + u;       w ← w − lr v                 all but SimCLR
    lr inside          v ← μ v + lr u;    w ← w − v                    SimCLR

Excluded tensors get neither weight decay nor adaptation (u = g). The forms differ also in what a
zero norm does.

The schedules are plain functions of the step or of the epoch; nothing here keeps state.

Source: You, Gitman, Ginsburg 2017, arXiv:1708.03888, and the official code of each method.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Exclude = Callable[[str, Tensor], bool]


def one_dimensional(name: str, parameter: Tensor) -> bool:
    """Biases, normalisation weights and scalars: what SimCLR, BYOL and MoCo v3 exclude."""
    return parameter.ndim <= 1


def exactly_one_dimensional(name: str, parameter: Tensor) -> bool:
    """DINO's test: a scalar is adapted."""
    return parameter.ndim == 1


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: each tensor moves by a fixed fraction of its own norm.

    Args:
        parameters: (name, parameter) pairs, as `module.named_parameters()` gives them.
        lr: learning rate; with the published trust of 1e-3 it is large (SimCLR: 4.8).
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0.
        trust: η, the fraction of its norm by which a tensor moves at lr = 1.
        form: "norm_of_sum" or "sum_of_norms".
        exclude: (name, parameter) -> True for tensors that get neither weight decay nor
            adaptation; None excludes nothing.
        eps: ε in the denominator.
        zero: what a tensor gets when one of the two norms is 0: "unscaled" keeps g + λ w with
            ratio 1, "skip_wd" leaves g alone.
        lr_inside: multiply by lr before the momentum buffer rather than after it. The two differ
            when lr changes.

    Presets with the constants of the official code: `LARS.simclr`, `.byol`, `.moco_v3`, `.dino`,
    `.larc`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        form: str = "norm_of_sum",
        exclude: Exclude | None = one_dimensional,
        eps: float = 0.0,
        zero: str = "unscaled",
        lr_inside: bool = False,
    ) -> None:
        if form not in ("norm_of_sum", "sum_of_norms"):
            raise ValueError(f"LARS: form must be norm_of_sum or sum_of_norms; got {form!r}.")
        if zero not in ("unscaled", "skip_wd"):
            raise ValueError(f"LARS: zero must be unscaled or skip_wd; got {zero!r}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"LARS: momentum must be in [0, 1); got {momentum}.")
        if lr < 0 or weight_decay < 0 or trust <= 0:
            raise ValueError(
                "LARS: lr and weight_decay must be at least 0 and trust above 0; "
                f"got {lr}, {weight_decay} and {trust}."
            )
        self.form, self.eps, self.zero, self.lr_inside = form, eps, zero, lr_inside
        named = list(parameters)
        excluded = [p for name, p in named if exclude is not None and exclude(name, p)]
        out = {id(p) for p in excluded}
        adapted = [p for _, p in named if id(p) not in out]
        groups = [
            {"params": adapted, "adapt": True, "weight_decay": weight_decay},
            {"params": excluded, "adapt": False, "weight_decay": 0.0},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            {"lr": lr, "momentum": momentum, "trust": trust},
        )

    @classmethod
    def simclr(cls, parameters: Iterable[tuple[str, Tensor]], lr: float, **options: Any) -> "LARS":
        """google-research/simclr: lr inside the momentum."""
        return cls(parameters, lr, **({"weight_decay": 1e-6, "lr_inside": True} | options))

    @classmethod
    def byol(cls, parameters: Iterable[tuple[str, Tensor]], lr: float, **options: Any) -> "LARS":
        """BYOL's optax chain.

        Differs from it: excluded are tensors with at most one dimension. The official filter goes
        by name and would also exclude a matrix in any module whose name contains "norm".
        """
        return cls(parameters, lr, **({"weight_decay": 1.5e-6} | options))

    @classmethod
    def moco_v3(cls, parameters: Iterable[tuple[str, Tensor]], lr: float, **options: Any) -> "LARS":
        """facebookresearch/moco-v3: the class token (three dimensions) is adapted and decayed."""
        return cls(parameters, lr, **({"weight_decay": 1e-6} | options))

    @classmethod
    def dino(cls, parameters: Iterable[tuple[str, Tensor]], lr: float, **options: Any) -> "LARS":
        """facebookresearch/dino `utils.LARS`: scalars are adapted too."""
        return cls(parameters, lr, **({"exclude": exactly_one_dimensional} | options))

    @classmethod
    def larc(cls, parameters: Iterable[tuple[str, Tensor]], lr: float, **options: Any) -> "LARS":
        """apex `LARC(SGD, trust_coefficient=0.001, clip=False)`: SwAV. Biases are adapted too."""
        published = {"form": "sum_of_norms", "exclude": None, "eps": 1e-8, "zero": "skip_wd"}
        return cls(parameters, lr, **({"weight_decay": 1e-6} | published | options))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is None:
            loss = None
        else:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            w = [p for p in group["params"] if p.grad is not None]
            if not w:
                continue
            g = [p.grad for p in w]
            u = self._adapted(g, w, group) if group["adapt"] else g
            v = [self._buffer(p) for p in w]
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, u, alpha=group["lr"] if self.lr_inside else 1.0)
            torch._foreach_add_(w, v, alpha=-1.0 if self.lr_inside else -group["lr"])
        return loss

    def _adapted(self, g: list[Tensor], w: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """(g + λ w) · ratio, without reading a norm back to the host."""
        decay = group["weight_decay"]
        u = list(torch._foreach_add(g, w, alpha=decay))
        w_norm = torch.stack(torch._foreach_norm(w))
        if self.form == "norm_of_sum":
            other = norm = torch.stack(torch._foreach_norm(u))
        else:
            other = torch.stack(torch._foreach_norm(g))
            norm = other + decay * w_norm
        usable = (w_norm > 0) & (other > 0)
        ratio = torch.where(usable, group["trust"] * w_norm / (norm + self.eps), 1.0)
        torch._foreach_mul_(u, list(ratio.unbind()))
        if self.zero == "skip_wd" and decay > 0:
            # Where a norm is 0, u = g + λ w; take λ w off again (ratio is 1 there).
            u = [torch.where(ok, a, b) for ok, a, b in zip(usable.unbind(), u, g, strict=True)]
        return u

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def cosine(t: float, *, total: float, start: float, end: float = 0.0) -> float:
    """Half a cosine from start (t = 0) to end (t ≥ total); t and total in any one unit.

    end + (start − end) · ½ (1 + cos π t/total)

    MoCo v2 and SimSiam: the learning rate, t in whole epochs. BYOL and MoCo v3: the key encoder's
    momentum up to 1, t in steps and in fractional epochs. DINO: momentum and weight decay, t in
    steps.
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(t / total, 1.0)))


def warmup_cosine(t: float, *, total: float, warmup: float, peak: float) -> float:
    """Linear from 0 to peak over `warmup`, then a cosine to 0 over the rest.

    t in steps: SimCLR v1 and v2, BYOL. t in fractional epochs: MoCo v3. The first step (t = 0) has
    learning rate 0.
    """
    if t < warmup:
        return t / warmup * peak
    return cosine(t - warmup, total=total - warmup, start=peak)


def simclr_steps(
    images: int, batch_size: int, epochs: int, warmup_epochs: float
) -> tuple[int, int]:
    """(total, warmup) in steps as SimCLR counts them."""
    return images * epochs // batch_size + 1, round(warmup_epochs * images // batch_size)


def linspace_cosine(
    step: int, *, total: int, warmup: int, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """Linear from start to peak, both included, then a cosine that never quite reaches end.

    SwAV (start 0.3, end 0.0048) and DINO (start 0). Differs from `warmup_cosine` by one step: the
    last step of the warm-up has the peak already, and the first step of the cosine has it again.
    """
    if step < warmup:
        return peak if warmup == 1 else start + (peak - start) * step / (warmup - 1)
    return cosine(step - warmup, total=total - warmup, start=peak, end=end)


def step_decay(
    epoch: int,
    *,
    start: float,
    milestones: Sequence[int],
    factor: float = 0.1,
    factors: Sequence[float] = (),
) -> float:
    """start · factor^(milestones reached). InstDisc, CMC and MoCo v1; epoch counts from 0.

    With factors, one for each milestone, start · (that of the last one reached): InvaSpread.
    """
    if factors and len(factors) != len(milestones):
        raise ValueError(
            f"factors must be one for each milestone; got {len(factors)} for {len(milestones)}"
        )
    reached = sum(epoch >= milestone for milestone in milestones)
    if factors:
        return start * (1.0, *factors)[reached]
    return start * factor**reached


def sgd(parameters: Iterable[tuple[str, Tensor]], lr: float, **options: Any) -> torch.optim.SGD:
    """Momentum SGD, weight decay on every parameter: InstDisc, CMC, MoCo v1 and v2, SimSiam."""
    return torch.optim.SGD([parameter for _, parameter in parameters], lr, **options)


def adamw(
    parameters: Iterable[tuple[str, Tensor]], lr: float, *, momentum: float, **options: Any
) -> torch.optim.AdamW:
    """AdamW with weight decay on every parameter, as MoCo v3 trains ViTs; momentum is β₁."""
    betas = (momentum, 0.999)
    return torch.optim.AdamW([parameter for _, parameter in parameters], lr, betas, **options)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "lars-simclr": LARS.simclr,
    "lars-byol": LARS.byol,
    "lars-moco-v3": LARS.moco_v3,
    "lars-dino": LARS.dino,
    "larc": LARS.larc,
}


def split_group(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], **changes: Any
) -> None:
    """Give these parameters groups of their own, with `changes`, else as their group was.

    fixed=True marks those whose lr no schedule changes (SimSiam's predictor); undecayed=True with
    weight_decay=0.0 those that get none, whatever the others get (DINO).
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": own, **changes})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


def optimizer_of(method: Any, config: Any) -> torch.optim.Optimizer:
    """The optimizer that a method's Config names, for what the method trains."""
    optimizer = OPTIMIZERS[config.optimizer](
        [(name, p) for name, p in method.named_parameters() if p.requires_grad],
        config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
    )
    split_group(optimizer, method.fixed_lr(), fixed=True)
    split_group(optimizer, method.undecayed(), undecayed=True, weight_decay=0.0)
    return optimizer


@torch.no_grad()
def clip_each_(parameters: Iterable[Tensor], most: float) -> None:
    """Scale the gradient of every parameter, by itself, to a norm of at most `most`: DINO.

    g ← g · min(1, most / (‖g‖ + 10⁻⁶));  torch.nn.utils.clip_grad_norm_ takes one norm for all.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (most / (norms + 1e-6)).clamp_(max=1)
        torch._foreach_mul_(gradients, list(factors.unbind()))


SCHEDULES = (
    "step",
    "cosine",
    "warmup-cosine",
    "warmup-cosine-byol",
    "warmup-cosine-moco-v3",
    "linspace-cosine",
)


def learning_rate(
    schedule: str,
    step: int,
    *,
    images: int,
    batch_size: int,
    epochs: int,
    lr: float,
    warmup_epochs: float = 0.0,
    start_lr: float = 0.0,
    final_lr: float = 0.0,
    milestones: Sequence[int] = (),
    factors: Sequence[float] = (),
) -> float:
    """The learning rate of a training step, counted from 0; an epoch drops its last partial batch.

    "step" and "cosine" change from epoch to epoch (MoCo v1 and v2), "warmup-cosine" (SimCLR; BYOL
    and MoCo v3 count their steps otherwise) and "linspace-cosine" (SwAV) at every step. `lr` is the
    peak.
    """
    steps_per_epoch = images // batch_size
    if schedule == "step":
        epoch = step // steps_per_epoch
        return step_decay(epoch, start=lr, milestones=milestones, factors=factors)
    if schedule == "cosine":
        return cosine(step // steps_per_epoch, total=epochs, start=lr, end=final_lr)
    if schedule == "warmup-cosine":
        total, warmup = simclr_steps(images, batch_size, epochs, warmup_epochs)
        return warmup_cosine(step, total=total, warmup=warmup, peak=lr)
    if schedule == "warmup-cosine-byol":  # partial batches count
        total, warmup = epochs * images // batch_size, int(warmup_epochs * images) // batch_size
        return warmup_cosine(step, total=total, warmup=warmup, peak=lr)
    if schedule == "warmup-cosine-moco-v3":  # whole batches; time in epochs
        t = step / steps_per_epoch
        return warmup_cosine(t, total=epochs, warmup=warmup_epochs, peak=lr)
    if schedule == "linspace-cosine":
        return linspace_cosine(
            step,
            total=epochs * steps_per_epoch,
            warmup=int(warmup_epochs * steps_per_epoch),
            peak=lr,
            start=start_lr,
            end=final_lr,
        )
    raise ValueError(f"unknown schedule {schedule!r}. Schedules: {', '.join(SCHEDULES)}.")


def learning_rate_at(step: int, config: Any, images: int) -> float:
    """The learning rate that a method's Config names, in a step of training on so many images."""
    return learning_rate(
        config.schedule,
        step,
        images=images,
        batch_size=config.batch_size,
        epochs=config.epochs,
        lr=config.lr,
        warmup_epochs=config.warmup_epochs,
        start_lr=config.start_lr,
        final_lr=config.final_lr,
        milestones=config.milestones,
        factors=config.factors,
    )
