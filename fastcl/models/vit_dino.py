"""DINO's vision transformer: timm's blocks, learned positions that follow the size of the crop.

    positions    N(0, 0.02), truncated, learned for image_size; bicubic for every other size
    weights      N(0, 0.02), truncated; every bias 0
    features     the class token after the last layer norm

The positions of a grid of h × w are sampled as for a grid of h + 0.1 by w + 0.1, as in the official
code, where it keeps a rounding error from losing a row; it moves every sample a little.

Source: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino, vision_transformer.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as nf

SIZES = {  # dim, heads, patch; twelve blocks each
    "vit-tiny-dino": (192, 3, 16),
    "vit-small-dino": (384, 6, 16),
    "vit-small-dino-8": (384, 6, 8),
    "vit-base-dino": (768, 12, 16),
    "vit-base-dino-8": (768, 12, 8),
}


class DINOTransformer(VisionTransformer):
    """timm's VisionTransformer with positions for the size of each image."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (N, h, w, D) -> tokens (N, 1 + h · w, D), the class token first."""
        count, height, width, _ = x.shape
        assert self.cls_token is not None and self.pos_embed is not None
        tokens = torch.cat([self.cls_token.expand(count, -1, -1), x.flatten(1, 2)], 1)
        placed: Tensor = self.pos_drop(tokens + resized(self.pos_embed, height, width))
        return placed


def resized(positions: Tensor, height: int, width: int) -> Tensor:
    """Positions (1, 1 + n · n, D), class token first, for a grid: (1, 1 + height · width, D)."""
    own, table = positions[:, :1], positions[:, 1:]
    side = round(table.shape[1] ** 0.5)
    if (height, width) == (side, side):
        return positions
    grid = table.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = nf.interpolate(grid, scale_factor=scale, mode="bicubic")
    assert grid.shape[-2:] == (height, width)
    return torch.cat([own, grid.flatten(2).transpose(1, 2)], 1)


def build(name: str, image_size: int, in_channels: int, drop_path: float) -> nn.Module:
    """The encoder of that name: images of any multiple of the patch -> (N, dim)."""
    dim, heads, patch = SIZES[name]
    vit: Any = DINOTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=0,
        global_pool="token",
        embed_dim=dim,
        depth=12,
        num_heads=heads,
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        dynamic_img_size=True,
    )
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(vit.pos_embed, std=0.02)
    nn.init.trunc_normal_(vit.cls_token, std=0.02)
    vit.feature_dim = dim
    encoder: nn.Module = vit
    return encoder
