"""info-nce-pytorch's InfoNCE (0.1) on fastcl's kernels.

    from fastcl.compat.info_nce import InfoNCE        or fastcl.compat.patch("info_nce")

Temperatures that are not above 0, and inputs that no kernel takes, run the package's own code.
Source: https://github.com/RElbers/info-nce-pytorch.
"""

from __future__ import annotations

from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._common import as_scalar, as_their_dtype, is_positive, matrices, pairs, their

__all__ = ["InfoNCE", "info_nce"]


class InfoNCE(nn.Module):
    """InfoNCE over a query's positive and negatives, all normalised: the package's InfoNCE.

        loss_i = log Σ_c exp(<q_i, c> / τ) − <q_i, p_i> / τ      c: the positive and the negatives

    query, positive_key (N, D). negative_keys: None, the other rows of positive_key;
    negative_mode="unpaired": (M, D), shared by all queries; "paired": (N, M, D), each query's own.
    reduction: "mean" or "sum" give (), "none" gives (N,). Shapes that do not fit: ValueError.
    """

    def __init__(
        self, temperature: float = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ):
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE as a function; see the class."""
    _check_shapes(query, positive_key, negative_keys, negative_mode)
    if not _fusable(query, positive_key, negative_keys, temperature, reduction, negative_mode):
        theirs = their("info_nce:info_nce", "these arguments are not ones that a kernel takes")
        loss: Tensor = theirs(
            query, positive_key, negative_keys, temperature, reduction, negative_mode
        )
        return loss
    loss = F.info_nce(
        query,
        positive_key,
        negative_keys,
        temperature=as_scalar(temperature),
        reduction=reduction,
    )
    inputs = [query, positive_key, *([] if negative_keys is None else [negative_keys])]
    return as_their_dtype(loss, *inputs)


def _fusable(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: float,
    reduction: str,
    mode: str,
) -> bool:
    if not pairs(query, positive) or reduction not in ("mean", "sum", "none"):
        return False
    if not is_positive(temperature):
        return False
    if negatives is None:
        return True
    if mode not in ("paired", "unpaired") or negatives.numel() == 0:
        return False
    rows = negatives.flatten(0, 1) if mode == "paired" else negatives
    return matrices(query, rows)


def _check_shapes(query: Tensor, positive: Tensor, negatives: Tensor | None, mode: str) -> None:
    """The package's own checks, in its words."""
    if query.dim() != 2:
        raise ValueError("<query> must have 2 dimensions.")
    if positive.dim() != 2:
        raise ValueError("<positive_key> must have 2 dimensions.")
    for kind, dims in (("unpaired", 2), ("paired", 3)):
        if negatives is not None and mode == kind and negatives.dim() != dims:
            raise ValueError(
                f"<negative_keys> must have {dims} dimensions if <negative_mode> == '{kind}'."
            )
    if len(query) != len(positive):
        raise ValueError("<query> and <positive_key> must must have the same number of samples.")
    if negatives is not None and mode == "paired" and len(query) != len(negatives):
        raise ValueError(
            "If negative_mode == 'paired', then <negative_keys> must have the same number of "
            "samples as <query>."
        )
    for other, name in ((positive, "positive_key"), (negatives, "negative_keys")):
        if other is not None and query.shape[-1] != other.shape[-1]:
            raise ValueError(
                f"Vectors of <query> and <{name}> should have the same number of components."
            )
