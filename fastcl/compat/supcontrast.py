"""SupConLoss of the SupContrast repository on fastcl's kernels.

    from fastcl.compat.supcontrast import SupConLoss        instead of the repository's losses.py

Differs from it: log Σ exp has no constant inside, so it is exact for any temperature.
Source: Khosla et al. 2020, arXiv:2004.11362; https://github.com/HobbitLong/SupContrast, losses.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._common import as_scalar, in_float, paired_dot, row_lse

__all__ = ["SupConLoss"]


class SupConLoss(nn.Module):
    """Supervised contrastive loss, or SimCLR's without labels: the repository's SupConLoss.

        loss_i = −τ / base_τ · Σ_j m_ij (s_ij − log Σ_{c≠i} exp s_ic) / Σ_j m_ij

    with s = <z, z> / τ over all views; m_ij = 1 where j ≠ i has i's label, or mask_ij where a mask
    is given, which may be asymmetric and need not be 0 or 1.

    features (B, V, ...): V views of B images, flattened behind; they are not normalised here.
    labels (B,), or mask (B, B), or neither: then the views of one image are its positives.
    contrast_mode: "all", every view is an anchor; "one", the first only. Returns (), the mean over
    the anchors, in at least float32, as the mask is.

    Quirks kept: τ / base_temperature scales the loss, so that at the paper's 0.07 / 0.07 it is 1;
    anchors without a positive give 0 and count in the mean.
    The matrix of similarities is not made; with a mask, the positives cost one (B, B) product.
    """

    def __init__(
        self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07
    ):
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if features.ndim < 3:
            raise ValueError(
                "`features` needs to be [bsz, n_views, ...], at least 3 dimensions are required"
            )
        features = features.flatten(2)
        images, views = features.shape[:2]
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`")
        if labels is not None and labels.numel() != images:
            raise ValueError("Num of labels does not match num of features")
        if self.contrast_mode not in ("one", "all"):
            raise ValueError(f"Unknown mode: {self.contrast_mode}")
        t = 1.0 / as_scalar(self.temperature)
        factor = as_scalar(self.temperature) / self.base_temperature
        if labels is mask is None and views == 2 and self.contrast_mode == "all" and t > 0:
            return factor * F.nt_xent(
                *in_float(features).unbind(1), temperature=self.temperature, normalize=False
            )  # the same, with the single positive kept apart
        z = features.transpose(0, 1).flatten(0, 1)  # (V B, D), view by view
        if self.contrast_mode == "all":
            anchors, of = z, torch.arange(len(z), device=z.device) % images
            lse = F.self_similarity_lse(z, scale=t)
        else:
            anchors, of = z[:images], torch.arange(images, device=z.device)
            column = torch.arange(len(z), device=z.device)
            lse = row_lse(anchors, z, scale=t, query_ids=of, key_ids=column)
        sums = in_float(features).sum(1)  # (B, D), over the views
        if mask is None:
            total, weight, itself = self._by_label(sums, labels, views)
        else:
            mask = mask.to(sums.device, sums.dtype)
            total, weight, itself = mask @ sums, views * mask.sum(1), mask.diagonal()
        # The anchor is not its own positive.
        weight = (weight - itself)[of]
        similarity = paired_dot(anchors, total[of]) - itself[of] * paired_dot(anchors, anchors)
        few = weight < 1e-6  # no positive: divided by 1
        loss = (weight * lse.clamp_min(-1e30) - t * similarity) / torch.where(few, 1.0, weight)
        return (factor * loss).mean()

    @staticmethod
    def _by_label(sums: Tensor, labels: Tensor | None, views: int) -> tuple[Tensor, Tensor, Tensor]:
        """mask @ sums (B, D), the mask's row sums (B,) and its diagonal, without the mask."""
        one = sums.new_ones(len(sums))
        if labels is None:
            return sums, views * one, one
        _, label = labels.to(sums.device).reshape(-1).unique(return_inverse=True)
        of_label = torch.zeros_like(sums).index_add(0, label, sums)
        number = torch.zeros_like(one).index_add(0, label, one)
        return of_label[label], views * number[label], one
