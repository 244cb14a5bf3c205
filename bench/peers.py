"""Other libraries' functions. Each `make(**sizes)` imports its library and returns a function.

What a library does beside the loss, such as updating a queue, stays in: users pay for it too. The
table notes it. The last ones need a CUDA device, and are called as their documentation says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

Function = Callable[..., Any]


# ---- lightly -------------------------------------------------------------------------------------


def lightly_nt_xent(**sizes: int) -> Function:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.5)


def lightly_info_nce(*, N: int, M: int, D: int) -> Function:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=0.07, memory_bank_size=(M, D))

    def call(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        loss.memory_bank.bank = negatives
        return loss(query, positive)

    return call


def lightly_dcl(**sizes: int) -> Function:
    from lightly.loss import DCLLoss

    return DCLLoss(temperature=0.1)


def lightly_sinkhorn(**sizes: int) -> Function:
    from lightly.loss.swav_loss import sinkhorn

    return torch.no_grad()(lambda scores: sinkhorn(scores, iterations=3, epsilon=0.05))


def lightly_self_distillation(*, S: int, T: int, N: int, K: int) -> Function:
    from lightly.loss import DINOLoss

    loss = DINOLoss(output_dim=K, teacher_temp=0.04, student_temp=0.1)

    def call(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        loss.center = center[None, None]
        return loss(list(teacher), list(student))

    return call


def lightly_negative_cosine(**sizes: int) -> Function:
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


def lightly_ema(**sizes: int) -> Function:
    from lightly.models.utils import update_momentum

    def parameters(tensors: list[Tensor]) -> nn.Module:
        module = nn.Module()  # update_momentum takes modules
        module.all = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)
        return module

    modules: list[nn.Module] = []

    def call(targets: list[Tensor], sources: list[Tensor]) -> None:
        if not modules:  # parameters that share the tensors' memory, made once
            modules.extend((parameters(sources), parameters(targets)))
        update_momentum(*modules, m=0.996)

    return call


def lightly_queue_push(*, B: int, M: int, D: int) -> Function:
    from lightly.models.modules.memory_bank import MemoryBankModule

    module = MemoryBankModule((M, D))

    def call(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
        module.bank, module.bank_ptr = queue, pointer
        module(keys, update=True)

    return call


# ---- pytorch-metric-learning, open_clip, info-nce-pytorch ----------------------------------------


def metric_learning_nt_xent(**sizes: int) -> Function:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=0.5))


def metric_learning_sup_con(**sizes: int) -> Function:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=0.07)


def open_clip_clip(**sizes: int) -> Function:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda image, text, t: loss(normalize(image, dim=1), normalize(text, dim=1), t)


def open_clip_siglip(**sizes: int) -> Function:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda image, text, t, b: loss(normalize(image, dim=1), normalize(text, dim=1), t, b)


def info_nce_pytorch(**sizes: int) -> Function:
    from info_nce import InfoNCE

    return InfoNCE(temperature=0.07)


def info_nce_pytorch_paired(**sizes: int) -> Function:
    from info_nce import InfoNCE

    return InfoNCE(temperature=0.07, negative_mode="paired")


# ---- with a CUDA device --------------------------------------------------------------------------


def memeff_clip(**sizes: int) -> Function:
    """stable=False: by default it rescales the gradients. Its temperature is a number."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=0.07, stable=False)
    return lambda image, text, t: loss(image, text)


def inf_cl_clip(*, N: int, D: int) -> Function:
    """The one-process function, a call for each direction; heads as wide as it takes them."""
    from inf_cl import cal_flash_loss

    width = next(w for w in (256, 128, 64, 32, 16) if D % w == 0)

    def call(image: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x, y = normalize(image, dim=1), normalize(text, dim=1)
        directions = (cal_flash_loss(a, b, scale=t, head_dim=width) for a, b in ((x, y), (y, x)))
        return sum(d.mean() for d in directions) / 2

    return call


def liger_clip(**sizes: int) -> Function:
    """A linear layer's fused cross entropy: the other tower's rows are the layer's weight."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()  # (weight, input, target)

    def call(image: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x, y = normalize(image, dim=1), normalize(text, dim=1)
        pair = torch.arange(len(x), device=x.device)
        t = t.to(x.dtype)
        return (loss(y, t * x, pair) + loss(x, t * y, pair)) / 2

    return call


def siglip_kernel_siglip(**sizes: int) -> Function:
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, t, b: fused_siglip_loss(
        normalize(image, dim=1), normalize(text, dim=1), t.log(), b
    )
