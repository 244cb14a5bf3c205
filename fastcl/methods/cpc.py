"""CPC: a context made of the rows of patches so far must tell which patches come later.

    z_{t,w} = f(patch in row t, column w)              (T, W) patches overlap by half
    c_{t,w} = g(rows ≤ t)
    L_k = −log exp(z_{t+a,w} · W_k c_{t,w}) / Σ_j exp(z_j · W_k c_{t,w}),    a = k + skipped rows
    L = mean over steps k of the mean over all (t, w), and images, for which row t + a exists

Neither side is normalised, there is no temperature, and each step has a W_k of its own. A sequence
is a grid of one column, with a GRU as g: CPC for sound. The candidates j are

    all        every patch of every image in the batch
    sampled    n of the rows that the step predicts, of any image
    permuted   the image of each patch under n permutations of all patches, the same in all steps
    others     n patches of other rows than t, of any image, the same in all steps, which then share
               the anchors of the last one: facebookresearch/CPC_audio, whose scale is 1/D

and in the last three, where the positive may be drawn too, the positive before them.

There is no official code; where the paper is silent: one row is skipped, because adjacent rows
overlap; g is the masked network of its successor (Hénaff et al. 2019, arXiv:1905.09272), of which
layer norm, targets of their own, a factor and four directions are options.

Source: van den Oord et al. 2018, arXiv:1807.03748.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

import fastcl.functional as F
from fastcl import models
from fastcl._functional._shared import paired_dot
from fastcl.data.augment import Crops
from fastcl.data.colours import CHANNELS
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.base import Method, Progress, option
from fastcl.models.patches import PatchEncoder

NEGATIVES = ("all", "sampled", "permuted", "others")
CONTEXTS = ("rows", "gru")
CROP = (256 / 300) ** 2


@dataclass(frozen=True)
class Config(BaseConfig):
    backbone: str = "resnet101-v2-plain"
    colours: str = "grey"
    image_size: int | None = 256
    augmentation: str = "cpc"
    crop_scale: tuple[float, float] = (CROP, CROP)
    epochs: int = 200  # the paper does not say
    batch_size: int = 512
    optimizer: str = "adamw"  # Adam, without weight decay
    lr: float = 2e-4
    weight_decay: float = 0.0
    schedule: str = "step"  # without milestones: constant
    patch: int = option(64, "side of a patch in pixels", at_least=1)
    stride: int = option(32, "pixels from one patch to the next", at_least=1)
    window: int = option(60, "side of the part of a patch that is shown", at_least=1)
    patch_jitter: float = option(0.0, "of the contrast and brightness of a patch", at_least=0)
    context: str = option("rows", "g: rows, a masked convolutional network, or gru, by column")
    context_blocks: int = option(5, "residual blocks of the masked network", at_least=1)
    context_dim: int = option(256, "hidden width of g", at_least=1)
    steps: int = option(5, "rows that are predicted", at_least=1)
    skip: int = option(1, "rows left out before the first predicted one", at_least=0)
    negatives: str = option("all", ", ".join(NEGATIVES))
    noise: int = option(16, "n, candidates for each prediction, unless all", at_least=1)
    detach_negatives: bool = option(False, "no gradient to the candidates but the positive")
    scale: float = option(1.0, "multiplies the predictions; 0.1 in CPC v2", above=0)
    target_dim: int = option(0, "targets: z through a linear layer; 0: z itself", at_least=0)
    layer_norm: bool = option(False, "of the latents, as in CPC v2")
    directions: int = option(1, "1: from the top; 4: from each side, as in CPC v2", at_least=1)


class RowContext(nn.Module):
    """A masked network: (N, T, W, D) -> (N, T, W, D), row t from rows ≤ t. CPC v2's.

    Source: Hénaff et al. 2019, arXiv:1905.09272, appendix.
    """

    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.dim = dim
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, hidden, 1),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),  # a row above: the next layer sees no row below
                nn.Conv2d(hidden, hidden, (2, 1)),
                nn.ReLU(),
                nn.Conv2d(hidden, dim, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, z: Tensor) -> Tensor:
        c = z.permute(0, 3, 1, 2)
        for block in self.blocks:
            c = c + block(c)
        return nf.relu(c).permute(0, 2, 3, 1)


class GRUContext(nn.Module):
    """A GRU down each column: (N, T, W, D) -> (N, T, W, hidden). The paper's, for sound."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim = hidden
        self.gru = nn.GRU(dim, hidden, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        count, rows, columns, _ = z.shape
        c: Tensor = self.gru(z.transpose(1, 2).flatten(0, 1))[0]  # (N · W, T, hidden)
        return c.view(count, columns, rows, -1).transpose(1, 2)


class CPC(Method):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=32,
            crop_scale=(0.5, 1.0),
            epochs=6,
            batch_size=16,  # the paper's of one GPU
            lr=0.0005,
            schedule="warmup-cosine-moco-v3",
            warmup_epochs=0.5,
            patch=12,
            stride=5,
            window=12,
            patch_jitter=1.0,
            context_blocks=2,
            context_dim=64,
            steps=3,
            skip=1,
            scale=0.1,
            target_dim=64,
            layer_norm=True,
            directions=4,
        ),
    }
    config: Config
    encoder: PatchEncoder

    @classmethod
    def build_encoder(cls, config: BaseConfig, image_size: int) -> nn.Module:
        assert isinstance(config, Config)
        encoder = models.build(
            config.backbone,
            image_size=config.patch,
            in_channels=CHANNELS[config.colours],
            zero_init_residual=config.zero_init_residual,
        )
        rows = (image_size - config.patch) // config.stride + 1
        if rows <= config.steps + config.skip:
            raise ValueError(
                f"{image_size} pixels are {max(rows, 0)} rows of patches: too few to predict "
                f"{config.steps} after {config.skip + 1}; take smaller patch, stride, steps or skip"
            )
        return PatchEncoder(
            encoder, config.patch, config.stride, config.window, config.patch_jitter
        )

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        c = config
        for name, value, choices in (
            ("negatives", c.negatives, NEGATIVES),
            ("context", c.context, CONTEXTS),
            ("directions", c.directions, (1, 4)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(str, choices))}; got {value!r}")
        dim = self.feature_dim
        self.norm = nn.LayerNorm(dim) if c.layer_norm else nn.Identity()
        self.target = nn.Linear(dim, c.target_dim) if c.target_dim else nn.Identity()
        contexts = [
            RowContext(dim, c.context_dim, c.context_blocks)
            if c.context == "rows"
            else GRUContext(dim, c.context_dim)
            for _ in range(c.directions)
        ]
        self.contexts = nn.ModuleList(contexts)
        outputs = c.steps * (c.target_dim or dim)  # W_1, W_2, … below each other
        self.predictors = nn.ModuleList(
            nn.Linear(context.dim, outputs, bias=c.target_dim > 0) for context in contexts
        )

    def encoders(self) -> list[nn.Module]:
        return [self.encoder.encoder]  # of patches: what makes them is called by another name

    def crops(self, image_size: int) -> list[Crops]:
        return [Crops(1, image_size, self.config.crop_scale)]

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        z = self.norm(self.encoder.grid(views[0]))  # (N, T, W, D)
        self.embedding = nf.normalize(z.detach().mean((1, 2)), dim=1)
        targets = self.target(z)
        turned = [
            (torch.rot90(targets, turn, (1, 2)), predictor(context(torch.rot90(z, turn, (1, 2)))))
            for turn, (context, predictor) in enumerate(zip(self.contexts, self.predictors))
        ]
        return self.step_losses(*turned).mean()

    def step_losses(self, *directions: tuple[Tensor, Tensor]) -> Tensor:
        """L_k (directions · steps,), each direction with the grid turned its own way.

        Of each: targets z (N, T, W, D) and predictions W_k c (N, T, W, steps · D).
        """
        if self.config.negatives == "all":
            pairs = [pair for direction in directions for pair in self.pairs(*direction)]
            return self.among_all(directions[0][0], pairs)
        return torch.stack([loss for z, wc in directions for loss in self.among_drawn(z, wc)])

    def pairs(self, z: Tensor, predictions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each step: predictions (A, D) and what they should have been (A, D)."""
        config, (rows, _, dim) = self.config, z.shape[1:]
        found = []
        for k, prediction in enumerate(predictions.split(dim, dim=3), start=1):
            ahead = k + config.skip
            starts = rows - ahead
            if config.negatives == "others":
                starts = rows - config.steps - config.skip  # that the last step can start from
            positive = z[:, ahead : ahead + starts].reshape(-1, dim)
            found.append((prediction[:, :starts].reshape(-1, dim), positive))
        return found

    def candidates(self, z: Tensor) -> Tensor:
        """The patches of the whole batch, row by row: (N · T · W, D) of z (N, T, W, D)."""
        flat = self.whole(z).flatten(0, 2)
        return flat.detach() if self.config.detach_negatives else flat

    def among_all(self, z: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The losses of pairs: a turned grid has the same patches, so one product does them all."""
        query, positive = (torch.cat(side) for side in zip(*pairs))
        scale = self.config.scale
        lse = cast(Tensor, F.similarity_lse(query, self.candidates(z), scale=scale))
        losses = lse - scale * paired_dot(query, positive)  # the positive is in the lse
        parts = losses.split([len(query) for query, _ in pairs])
        return torch.stack([self.mean(part) for part in parts])

    def among_drawn(self, z: Tensor, predictions: Tensor) -> list[Tensor]:
        """The losses of the steps in one direction, against the positive and n candidates."""
        flat, (rows, columns) = self.candidates(z), z.shape[1:3]
        images = len(flat) // (rows * columns)  # of the whole batch
        last = rows - self.config.steps - self.config.skip
        tables = self.tables(images, rows, columns, last, z.device)
        losses = []
        for table, (query, positive) in zip(tables, self.pairs(z, predictions)):
            index = self.own(self.agreed(table).unflatten(0, (images, -1))).flatten(0, 1)  # (A, n)
            losses.append(self.among(self.config.scale * query, positive, flat[index]))
        return losses

    def among(self, query: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
        """Cross entropy, 0-dim, of query (A, D) with positive (A, D) against (A, n, D) and it."""
        return F.info_nce(
            query, positive, candidates, temperature=1.0, normalize=False, group=self.group
        )

    def tables(
        self, count: int, rows: int, columns: int, last: int, device: torch.device
    ) -> list[Tensor]:
        """The candidates of each step, rows of the flat (N · T · W, D): index (A, n) each."""
        config = self.config
        n, total = config.noise, count * rows * columns
        aheads = [k + config.skip for k in range(1, config.steps + 1)]
        sizes = [count * (rows - ahead) * columns for ahead in aheads]
        if config.negatives == "sampled":
            patch = torch.arange(total, device=device).view(count, rows, columns)
            tables = []
            for ahead, size in zip(aheads, sizes, strict=True):
                predicted = patch[:, ahead:].flatten()
                tables.append(predicted[torch.randint(size, (size, n), device=device)])
            return tables
        if config.negatives == "permuted":
            table = torch.rand(n, total, device=device).argsort(1).T  # (N · T · W, n)
            return [table[total - size :] for size in sizes]
        if config.negatives == "others":
            shape = (count, last, columns, n)
            image = torch.randint(count, shape, device=device)
            away = torch.randint(1, rows, shape, device=device)
            start = torch.arange(last, device=device)[:, None, None]
            column = torch.arange(columns, device=device)[:, None]
            index = (image * rows + (start + away) % rows) * columns + column
            return [index.flatten(0, 2)] * config.steps
        return []

    def collapsed_loss(self) -> float | None:
        if self.config.negatives != "all":
            return math.log(1 + self.config.noise)
        return None
