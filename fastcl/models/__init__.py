"""Encoders: images (N, C, H, W) -> features (N, feature_dim).

build("tiny-resnet", image_size=32)     the small defaults: tiny-resnet, tiny-vit
build("resnet50", image_size=224)       torchvision's ResNets, with their own parameter names
build("vit-small-moco-v3", image_size=224)      MoCo v3's transformers, -small- and -base-
build("vit-small-dino", image_size=224)         DINO's, for crops of several sizes
build("resnet101-v2-plain", image_size=64)     CPC's encoder of patches, without batch norm
build("alexnet-bn", image_size=224)     for CMC, which halves its width
build("timm/vit_small_patch16_224", image_size=224)     anything that timm has
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from fastcl.models import vit_moco_v3
from fastcl.models.alexnet import AlexNet
from fastcl.models.patches import PlainResNet
from fastcl.models.tiny import TinyResNet, TinyViT

__all__ = ["NAMES", "build"]

TINY = ("tiny-resnet", "tiny-vit")
TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
DINO = (
    *("vit-tiny-dino", "vit-small-dino", "vit-base-dino"),
    *("vit-small-dino-8", "vit-base-dino-8"),
)
NAMES = (
    *TINY,
    *TORCHVISION,
    *vit_moco_v3.SIZES,
    *DINO,
    "resnet101-v2-plain",
    "alexnet-bn",
)  # and timm/<name> for every name of timm.list_models()
SMALL_IMAGE = 64  # pixels: at most this much, and the stem keeps the resolution


def build(
    name: str,
    *,
    image_size: int,
    in_channels: int = 3,
    zero_init_residual: bool = False,
    width: float = 1.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """A randomly initialised encoder with attribute `feature_dim`.

    zero_init_residual   the last batch norm of each residual block starts at γ = 0, so the block
                         starts as the identity (Goyal et al. 2017, arXiv:1706.02677). ResNets only.
    width                multiplies the channels after the stem, as CMC widens it. ResNets only.
    drop_path            probability that training leaves out the last block, growing from 0 at the
                         first (Huang et al. 2016, arXiv:1603.09382). Transformers only.
    For images of at most 64 pixels a torchvision ResNet gets the small-image stem: 3×3, stride 1,
    no max-pool (SimCLR, Chen et al. 2020, arXiv:2002.05709, appendix B.9).
    Raises ValueError for an unknown name, with the list, and where an option does not apply.
    """
    is_resnet = name == "tiny-resnet" or name in TORCHVISION
    if is_resnet and drop_path:
        raise ValueError(f"drop_path is for transformers; backbone {name!r} takes none")
    if name == "tiny-resnet":
        widths = [round(w * width) for w in (32, 64, 128)]
        return TinyResNet(in_channels, tuple(widths), zero_init_residual=zero_init_residual)
    if name in TORCHVISION:
        return _torchvision(name, image_size, in_channels, zero_init_residual, width)
    if name not in NAMES and not name.startswith("timm/"):
        raise ValueError(f"unknown backbone {name!r}. Backbones: {', '.join(NAMES)}, timm/<name>")
    if zero_init_residual:
        raise ValueError(f"zero_init_residual is for ResNets; backbone {name!r} takes none")
    if name == "alexnet-bn":
        if image_size != 224:
            raise ValueError(f"alexnet-bn takes images of 224 pixels; got {image_size}")
        return AlexNet(in_channels, width)
    if width != 1:
        raise ValueError(f"width is for ResNets; backbone {name!r} takes none")
    if name == "tiny-vit":
        return TinyViT(in_channels, drop_path=drop_path)
    if name == "resnet101-v2-plain":
        return PlainResNet(in_channels, image_size)
    if name in DINO:
        from fastcl.models import vit_dino

        return vit_dino.build(name, image_size, in_channels, drop_path)
    if name in vit_moco_v3.SIZES:
        return vit_moco_v3.build(name, image_size, in_channels)
    return _timm(name.removeprefix("timm/"), image_size, in_channels, drop_path)


def _torchvision(
    name: str, image_size: int, in_channels: int, zero_init_residual: bool, width: float
) -> nn.Module:
    import torchvision

    model: Any = torchvision.models.get_model(name, zero_init_residual=zero_init_residual)
    stem = model.conv1.out_channels
    if width != 1:
        _widen(model, width, zero_init_residual)
    if image_size <= SMALL_IMAGE:
        model.conv1 = nn.Conv2d(in_channels, stem, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.feature_dim = model.fc.in_features
    model.fc = nn.Identity()
    module: nn.Module = model
    return module


def _widen(model: Any, width: float, zero_init_residual: bool) -> None:
    """Make the four stages anew, each of `width` times the channels; the stem keeps its own."""
    model.inplanes = model.conv1.out_channels
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        planes = round(64 * 2**i * width)
        made = model._make_layer(type(stage[0]), planes, len(stage), stride=1 if i == 0 else 2)
        setattr(model, f"layer{i + 1}", made)
        for name, module in made.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and name.endswith("bn3" if hasattr(made[0], "bn3") else "bn2"):
                nn.init.zeros_(cast(nn.BatchNorm2d, module).weight)
    model.fc = nn.Linear(model.inplanes, 1)


def _timm(name: str, image_size: int, in_channels: int, drop_path: float) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:10]
        some = f" There are: {', '.join(close)}, …" if close else ""
        raise ValueError(f"unknown backbone 'timm/{name}'.{some} All: timm.list_models()")
    options: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # transformers have a table of positions
        options["img_size"] = image_size
    if drop_path:
        options["drop_path_rate"] = drop_path
    model: Any = timm.create_model(name, num_classes=0, in_chans=in_channels, **options)
    model.feature_dim = getattr(model, "head_hidden_size", None) or model.num_features
    module: nn.Module = model
    return module
