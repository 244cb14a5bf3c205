"""The similarity of each row to the mean of its label's other rows, on this process or on all."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.distributed import Share, gather, sum_over_ranks
from fastcl.ops.label_similarity import label_similarity
from fastcl.reference._common import in_float, normalized
from fastcl.reference.label_similarity import others_of, sums_at


def similarity_to_own_label(
    z: Tensor, labels: Tensor, normalize: bool, at: Share
) -> tuple[Tensor, Tensor]:
    """mean (N,), 0 where there are no others, and how many they are (N,), of z (N, D)."""
    if at.group is None:
        mean, others = label_similarity(z, labels, normalize)[:2]
        return mean, others
    x = normalized(in_float(z), normalize)
    names = gather(labels, at).sort().values
    others = others_of(names, labels)
    names = names.unique()  # only as many sums as there are labels travel between the ranks
    place = torch.searchsorted(names, labels)
    rest = sum_over_ranks(sums_at(x, place, len(names)), at).index_select(0, place) - x
    return (x * rest).sum(1) / others.clamp_min(1), others
