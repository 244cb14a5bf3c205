"""torch.compile of an encoder, in place and for training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CompileError(RuntimeError):
    """torch.compile cannot do it here; the message is one line."""


def compile_(module: nn.Module) -> None:
    """From now on module(x) runs compiled in training. Its state dict stays what it is.

    In evaluation it stays as it was: compiling once more would take longer than it saves. Raises
    CompileError at the first call where there is no compiler that works.
    """
    plain, compiled = module.forward, torch.compile(module.forward)

    def forward(x: Tensor) -> Any:
        if not module.training:
            return plain(x)
        try:
            return compiled(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).partition("\nSet TORCH")[0].split())[:300]
            raise CompileError(f"torch.compile cannot compile the encoder here: {reason}") from None

    module.forward = forward
