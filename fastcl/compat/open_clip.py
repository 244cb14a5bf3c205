"""open_clip's losses (3.x) on fastcl's kernels.

    from fastcl.compat.open_clip import ClipLoss        or fastcl.compat.patch("open_clip")

Features are taken as they are: open_clip normalises them in the model. open_clip need not be
installed, except for inputs that no kernel takes and for Horovod.

With world_size > 1, which must be torch.distributed's, each process computes its own rows' share
and no matrix of all pairs, whatever `local_loss` and `dist_impl` say: those choose what is
returned and who gets gradients, as documented below. Differs from open_clip: a process's gradient
of logit_scale is its share of the whole batch's, where open_clip's is that of its own loss; their
mean over processes, which DistributedDataParallel takes, is the same.
Source: https://github.com/mlfoundations/open_clip, src/open_clip/loss.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._common import (
    ODD,
    against,
    as_scalar,
    as_their_dtype,
    everyone,
    fall_back,
    in_float,
    is_positive,
    is_scalar,
    paired_dot,
    pairs,
)
from fastcl.distributed import Ring

__all__ = ["ClipLoss", "SigLipLoss"]

CLIP = "open_clip.loss:ClipLoss"
SIGLIP = "open_clip.loss:SigLipLoss"


class ClipLoss(nn.Module):
    """CLIP's symmetric loss: open_clip's ClipLoss.

        s = logit_scale · image @ text.T + logit_bias
        (cross_entropy(s, arange(N)) + cross_entropy(s.T, arange(N))) / 2

    image_features, text_features (N, D); logit_scale, already exponentiated, a float or a tensor
    that may need a gradient. Returns (), or {"contrastive_loss": ()} with output_dict.
    A scalar bias changes nothing, and gets the gradient 0. `get_logits` and `get_ground_truth` are
    here for subclasses; where a subclass overrides one, or with a bias that is not a scalar, the
    logits are materialised.

    With several processes, as in open_clip: the mean over this process's rows with `local_loss`,
    else over all rows. Features get the gradient of all processes' losses with `gather_with_grad`;
    without it, with `local_loss`, of this process's loss through its queries only, else of the
    whole batch's loss, once: a world_size-th of the other's (open_clip#616).
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive (N,), kept from call to call with cache_labels."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, materialised."""
        if self.world_size > 1:
            both: tuple[Tensor, Tensor] = fall_back(self, CLIP, "world_size > 1", "get_logits")(
                image_features, text_features, logit_scale, logit_bias
            )
            return both
        per_image = logit_scale * image_features @ text_features.T
        per_text = logit_scale * text_features @ image_features.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        why = self._cannot_fuse(image_features, text_features, logit_scale, logit_bias)
        if why:
            theirs = fall_back(self, CLIP, why)
            loss = theirs(image_features, text_features, logit_scale, logit_bias)
        elif self.world_size > 1:
            loss = self._across(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = self._fused(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _fused(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
    ) -> Tensor:
        t = as_scalar(logit_scale)
        pair = self.get_ground_truth(image.device, len(image))
        rows, columns = F.similarity_lse(
            image, text, scale=t, query_ids=pair, key_ids=pair, reduce="both"
        )
        loss = against(torch.stack((rows, columns)), t * paired_dot(image, text)).mean()
        return as_their_dtype(with_bias(loss, logit_bias), image, text)

    def _across(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
    ) -> Tensor:
        """The rows of this process, all processes' columns."""
        rows = len(image) * (1 if self.local_loss else self.world_size)
        self.get_ground_truth(image.device, rows)  # for its cache alone
        t = as_scalar(logit_scale)
        if self.local_loss and not self.gather_with_grad:
            loss = (one_way(image, text, t) + one_way(text, image, t)) / 2
        else:
            share = 1.0 if self.gather_with_grad else 1.0 / self.world_size
            loss = F.clip(
                with_gradient_times(share, image),
                with_gradient_times(share, text),
                logit_scale=t,
                normalize=False,
                group=everyone(),
            )
        if not self.local_loss:  # everybody's mean, with the gradient of this process's part
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            loss = loss + (mean / self.world_size - loss.detach())
        return as_their_dtype(with_bias(loss, logit_bias), image, text)

    def _cannot_fuse(
        self, image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor | None
    ) -> str | None:
        if self.world_size > 1 and (self.use_horovod or not is_the_world(self)):
            return "world_size > 1 without torch.distributed"
        own = (ClipLoss.get_logits, ClipLoss.get_ground_truth)
        if (type(self).get_logits, type(self).get_ground_truth) != own:
            return "a subclass has its own logits or labels"
        scalars = is_scalar(scale) and (bias is None or is_scalar(bias))
        if self.world_size > 1:
            scalars = scalars and is_positive(scale)
        return None if scalars and pairs(image, text) else ODD


def one_way(query: Tensor, key: Tensor, t: float | Tensor) -> Tensor:
    """Mean cross entropy of this process's queries against all processes' keys, as constants."""
    inverse = 1.0 / t
    return F.info_nce(
        query,
        key.detach(),
        temperature=inverse,
        normalize=False,
        group=everyone(),
    )


def with_gradient_times(share: float, x: Tensor) -> Tensor:
    """x itself; what flows back to it is multiplied by `share`."""
    if share == 1.0 or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    alias = x.view_as(x)
    alias.register_hook(lambda grad: grad * share)
    return alias


def with_bias(loss: Tensor, bias: float | Tensor | None) -> Tensor:
    """The loss, which a bias does not change: its gradient is 0."""
    return loss + 0 * bias.sum() if isinstance(bias, Tensor) else loss


def is_the_world(loss: ClipLoss | SigLipLoss) -> bool:
    """Whether the rank and world_size that a loss was told are torch.distributed's."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return (loss.rank, loss.world_size) == (distributed.get_rank(), distributed.get_world_size())


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss: open_clip's SigLipLoss.

        s = logit_scale · image @ text.T + logit_bias;  z = 2 eye(N) − 1
        −logsigmoid(z s).sum() / N

    image_features, text_features (N, D); logit_scale and logit_bias scalars (the bias may be
    None), which may need gradients. Returns (), or {"contrastive_loss": ()} with output_dict.

    With several processes, this one's images against everybody's texts: gathered for
    dist_impl="gather" and "reduce", sent round for "bidir" (the default) and "shift".
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        assert self.dist_impl in ("bidir", "shift", "reduce", "gather")
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """z (N, N): 1 for pairs, −1 for others; all −1 with negative_only."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        if not negative_only:
            labels = 2 * torch.eye(num_logits, device=device, dtype=dtype) + labels
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        image, text = image_features, text_features
        if not self._fusable(image, text, logit_scale, logit_bias):
            unfused: Tensor = fall_back(self, SIGLIP, ODD, "_loss")(
                image, text, logit_scale, logit_bias, negative_only
            )
            return unfused
        t = as_scalar(logit_scale)
        b = 0.0 if logit_bias is None else as_scalar(logit_bias)
        if negative_only:  # the diagonal's gradients cancel below: in float32, not in bfloat16
            image, text = in_float(image), in_float(text)
            t, b = (in_float(x) if isinstance(x, Tensor) else x for x in (t, b))
        loss = F.siglip(image, text, logit_scale=t, logit_bias=b, normalize=False)
        if negative_only:  # −log σ(−s) = −log σ(s) + s on the diagonal
            loss = loss + (t * paired_dot(image, text) + b).mean()
        return as_their_dtype(loss, image_features, text_features)

    def _across(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
    ) -> Tensor:
        """The images of this process, all processes' texts."""
        world = everyone()
        loss = F.siglip(
            image,
            text,
            logit_scale=as_scalar(logit_scale),
            logit_bias=0.0 if logit_bias is None else as_scalar(logit_bias),
            normalize=False,
            group=Ring(world) if self.dist_impl in ("bidir", "shift") else world,
        )
        return as_their_dtype(loss, image, text)

    def _fusable(
        self, image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor | None
    ) -> bool:
        own = (SigLipLoss.get_logits, SigLipLoss.get_ground_truth)
        if (type(self).get_logits, type(self).get_ground_truth) != own:
            return False
        scalars = is_positive(scale) and (bias is None or is_scalar(bias))
        return scalars and pairs(image, text)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        features = (image_features, text_features)
        fused = self._fusable(*features, logit_scale, logit_bias) and is_the_world(self)
        if self.world_size > 1 and fused:
            loss = self._across(image_features, text_features, logit_scale, logit_bias)
        elif self.world_size > 1:  # its exchange between processes calls our _loss
            exchange = fall_back(self, SIGLIP, "world_size > 1 exchanges texts")
            loss = exchange(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
