"""What a method is to the trainer: a loss, and what happens around the optimizer's step.

A method holds its networks and its state (queue, prototypes, momentum copy). It knows nothing of
optimizers, data loading, logging or evaluation: its Config names them, train.py does them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastcl import distributed, models
from fastcl._functional._shared import reduce
from fastcl.data.augment import Crops
from fastcl.data.colours import CHANNELS
from fastcl.distributed import Group


def option(
    default: Any, help: str, *, above: float | None = None, at_least: float | None = None
) -> Any:
    """A field of a Config: what `--help` says of it, and what its value must be."""
    return field(default=default, metadata={"help": help, "above": above, "at_least": at_least})


STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_stored(name: str, value: str) -> None:
    """Raises ValueError unless a queue or bank can be stored so."""
    if value not in STORED:
        raise ValueError(f"{name} must be {', '.join(STORED)}; got {value!r}")


@dataclass(frozen=True)
class Config:
    """The fields that every method has; each is a command-line flag."""

    backbone: str = option("resnet50", "encoder (fastcl.models)")
    zero_init_residual: bool = option(
        False, "residual blocks begin as the identity: γ = 0 in their last batch norm; ResNets"
    )
    image_size: int | None = option(None, "side of the (large) crops; none: the data's", at_least=8)
    augmentation: str = option("moco-v1", "list of operations (fastcl.data.augment)")
    crop_scale: tuple[float, float] = option((0.2, 1.0), "share of the image that a crop covers")
    jitter: float = option(1.0, "multiplies the strength of the colour jitter", at_least=0)
    blur: bool = option(True, "blur, in the lists that have one")
    colours: str = option("rgb", "what the encoder sees: rgb, grey, lab or ycbcr")
    epochs: int = option(200, "passes over the training images", at_least=1)
    batch_size: int = option(
        256, "images per step, of all processes together; each gives several views", at_least=2
    )
    optimizer: str = option(
        "sgd", "sgd, adamw, lars-simclr, lars-byol, lars-moco-v3, lars-dino or larc"
    )
    lr: float = option(0.03, "peak learning rate; it is not scaled with the batch", above=0)
    sgd_momentum: float = option(0.9, "momentum of the optimizer", at_least=0)
    weight_decay: float = option(1e-4, "weight decay", at_least=0)
    schedule: str = option(
        "cosine",
        "step, cosine, warmup-cosine, warmup-cosine-byol, warmup-cosine-moco-v3 or linspace-cosine",
    )
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", at_least=0)
    start_lr: float = option(0.0, "where a linspace-cosine's warm-up begins", at_least=0)
    final_lr: float = option(0.0, "learning rate at the end of a cosine", at_least=0)
    milestones: tuple[int, ...] = option((), "epochs at which a step schedule multiplies by 0.1")
    factors: tuple[float, ...] = option((), "or of the peak, from each milestone on")


@dataclass(frozen=True)
class Progress:
    """Where training is: `step` batches are done, of `steps_per_epoch` · `epochs`.

    `indices` int64 (N,) says which of the training images the batch holds, on its device.
    """

    step: int
    steps_per_epoch: int
    epochs: int
    indices: Tensor | None = None

    @property
    def epoch(self) -> int:
        """The epoch that this step belongs to, from 0."""
        return self.step // self.steps_per_epoch


class Method(nn.Module):
    """One self-supervised method.

    For every batch the trainer runs

        loss = method.loss(views, at);  loss.backward();  method.after_backward(at)
        optimizer.step();  method.after_step(at)

    `encoder` is the backbone, `kept` the name of the module that is kept and evaluated after
    training: it, but for a method whose moving average is the better one. Subclasses set
    `embedding` in `loss`: the batch's unit embeddings (N, dim) without gradient, which the trainer
    watches for collapse.
    """

    recipes: ClassVar[dict[str, Config]]
    kept: ClassVar[str] = "encoder"

    encoder: nn.Module
    embedding: Tensor
    group: Group | None = None  # the processes that share each batch out

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_dim = cast(int, encoder.feature_dim)
        self.config = config

    @classmethod
    def build_encoder(cls, config: Config, image_size: int) -> nn.Module:
        """The encoder that `__init__` takes, untrained: images -> (N, feature_dim)."""
        return models.build(
            config.backbone,
            image_size=image_size,
            in_channels=CHANNELS[config.colours],
            zero_init_residual=config.zero_init_residual,
        )

    def look(self, images: Tensor) -> None:
        """Some training images uint8 (B, 3, H, W). Raises ValueError when they are of no use."""

    def set_images(self, images: int) -> None:
        """How many training images there are: once, for methods that remember each of them."""

    def crops(self, image_size: int) -> list[Crops]:
        """The views that `loss` gets: (how many, their side in pixels, share of the image)."""
        return [Crops(2, image_size, self.config.crop_scale)]

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        """The loss of a batch, 0-dim: views are (N, 3, size, size) each, large crops first."""
        raise NotImplementedError

    def after_backward(self, at: Progress) -> None:
        """Between backward and the optimizer's step."""

    def after_step(self, at: Progress) -> None:
        """After the optimizer's step."""

    def fixed_lr(self) -> Iterable[nn.Parameter]:
        """Parameters whose learning rate stays at its peak, whatever the schedule says."""
        return ()

    def undecayed(self) -> Iterable[nn.Parameter]:
        """Parameters that get no weight decay."""
        return ()

    def weight_decay_at(self, at: Progress) -> float | None:
        """The weight decay of this step; None where it stays what the Config says."""
        return None

    def momentum_at(self, at: Progress) -> float | None:
        """The momentum of the key or target encoder in this step; None where there is none."""
        return None

    def collapsed_loss(self) -> float | None:
        """The loss when all embeddings are the same, in nats; None where it has no such value."""
        return None

    def encoders(self) -> list[nn.Module]:
        """The encoder and its moving averages: what is compiled, and run a few rows at a time."""
        return [
            module
            for module in self.modules()
            if type(module) is type(self.encoder) and hasattr(module, "feature_dim")
        ]

    def whole(self, x: Tensor) -> Tensor:
        """The rows of the whole batch, of which x (N, …) are this process's."""
        return distributed.whole(x, self.group)

    def own(self, x: Tensor) -> Tensor:
        """This process's rows of the whole batch's x; of one process, x."""
        return distributed.own(x, self.group)

    def agreed(self, x: Tensor) -> Tensor:
        """x, drawn at random for the whole batch, as all processes are to have it."""
        return distributed.agreed(x, self.group)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of losses (N,): the average over processes is that over the whole batch."""
        return reduce(losses, "mean", distributed.share(len(losses), self.group, losses.device))

    def encode(self, views: Sequence[Tensor]) -> Tensor:
        """Features of all views, in their order: (V · N, features).

        One pass of the encoder per size of crop, so that its batch norm sees the crops of one size
        together, as in SwAV's and DINO's multi-crop.
        """
        sizes = groupby(views, key=lambda view: view.shape[-1])
        return torch.cat([self.encoder(torch.cat(list(crops))) for _, crops in sizes])
