"""MoCo v3's vision transformer: timm's blocks, fixed positions, its own initialisation.

    positions    fixed: sines and cosines in two dimensions, zeros for the class token; bicubic for
                 crops of another size than image_size
    class token  N(0, 10⁻⁶)
    qkv          uniform in ± √(6 / (dim + dim)), as three matrices
    patches      uniform in ± √(6 / (3 p² + dim)), as one matrix
    others       Xavier, uniform;  every bias 0
    features     the class token after the last layer norm

ViT-S has twelve heads, where DeiT's has six.

Source: Chen et al. 2021, arXiv:2104.02057; facebookresearch/moco-v3, vits.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastcl.models.tiny import sine_positions

SIZES = {  # dim, blocks, heads
    "vit-small-moco-v3": (384, 12, 12),
    "vit-base-moco-v3": (768, 12, 12),
}


def build(name: str, image_size: int, in_channels: int = 3, patch: int = 16) -> nn.Module:
    """The encoder of that name, an image of image_size pixels -> (N, dim)."""
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    dim, depth, heads = SIZES[name]
    vit: Any = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=0,
        global_pool="token",
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        dynamic_img_size=True,
    )
    initialize_(vit)
    vit.feature_dim = dim
    module: nn.Module = vit
    return module


@torch.no_grad()
def initialize_(vit: Any) -> None:
    """Give timm's VisionTransformer MoCo v3's positions and weights."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(".qkv"):
                bound = math.sqrt(6 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = vit.patch_embed
    nn.init.normal_(vit.cls_token, std=1e-6)
    nn.init.xavier_uniform_(patches.proj.weight.flatten(1))
    nn.init.zeros_(patches.proj.bias)
    height, width = patches.grid_size
    table = sine_positions(height, width, vit.pos_embed.shape[-1])
    vit.pos_embed.copy_(torch.cat([torch.zeros(1, table.shape[1]), table])[None])
    vit.pos_embed.requires_grad_(False)
