"""The losses of other libraries on fastcl's kernels, under their names and with their semantics.

    from fastcl.compat.lightly import NTXentLoss        instead of lightly.loss.NTXentLoss

    fastcl.compat.patch("lightly")                      every use of the library's own, from here on
    with fastcl.compat.patch("lightly"): ...            or for a block only

Constructors, defaults, forward signatures, shapes and dtypes of results, buffers and the keys of
state dicts are the library's, and so are its quirks; each class's docstring names those that
matter, and what differs. What cannot be fused runs the library's own code, and says so once
(FallbackWarning). No module here imports its library before it is needed.

    lightly                    NTXentLoss, SwaVLoss, DINOLoss, DCLLoss, DCLWLoss, MemoryBankModule,
                               NegativeCosineSimilarity, sinkhorn, update_momentum
    open_clip                  ClipLoss, SigLipLoss
    pytorch_metric_learning    NTXentLoss, SupConLoss, CrossBatchMemory
    sentence_transformers      MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss
    info_nce                   InfoNCE, info_nce
    supcontrast                SupConLoss, of the SupContrast repository
    official                   functions for the published code of MoCo, SimCLR, SwAV, DINO,
                               InstDisc and CMC

The last two have no package to patch. A second derivative (create_graph=True) raises in all of
them: the kernels have none.
"""

from fastcl.compat._common import FallbackWarning
from fastcl.compat._patch import PATCHABLE, Patch, patch

__all__ = ["PATCHABLE", "FallbackWarning", "Patch", "patch"]
