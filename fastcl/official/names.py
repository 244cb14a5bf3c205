"""What the released files call their tensors, and what the methods here call them.

Each function takes the tensors of a file by their names and gives them by ours, with the fields of
the method's Config that their shapes tell. The network's own names are torchvision's for ResNets
(`layer1.0.bn1.weight`) and timm's for transformers (`blocks.0.attn.qkv.weight`), there as here.

    MoCo v1, v2   encoder_q. and encoder_k.: the network, its head as fc;  queue (dim, K), queue_ptr
    SimSiam       encoder.: the network, the projector as fc;  predictor.
    SwAV          the network without a prefix, projection_head., prototypes.
    MoCo v3       base_encoder. and momentum_encoder.: the network, the projector as fc (ResNet) or
                  head (ViT);  predictor.
    DINO          student and teacher, each backbone. and head.;  or a backbone alone: the teacher's
    BYOL          online and target under any of their usual names, each an encoder and a projector;
                  a predictor
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]
Values = dict[str, Any]
Rule = tuple[str, str]


def rename(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> Tensors:
    """Each tensor under the name that the first rule to match makes of its own.

    Names that no rule matches stay, to be found unexpected later.
    """
    named = {}
    for name, tensor in tensors.items():
        for pattern, ours in rules:
            new, count = re.subn(f"^{pattern}$", ours, name)
            if count:
                name = new
                break
        named[name] = tensor
    return named


def width(tensors: Tensors, name: str) -> int:
    """How many outputs the layer of that weight has. Raises KeyError."""
    return tensors[name].shape[0]


def layers_of(tensors: Tensors, part: str) -> list[int]:
    """The positions in a part of the linear layers: those of its matrices, ascending."""
    found = (re.fullmatch(rf"{part}\.(\d+)\.weight", name) for name in tensors)
    return sorted(int(m[1]) for m in found if m and tensors[m[0]].ndim == 2)


def ends_in_norm(tensors: Tensors, part: str) -> bool:
    """Whether a batch norm comes after the last linear layer of a part."""
    return f"{part}.{layers_of(tensors, part)[-1] + 1}.running_mean" in tensors


# ---- one function a family -----------------------------------------------------------------------


def moco(tensors: Tensors) -> tuple[Tensors, Values]:
    """MoCo v1 and v2."""
    named = rename(
        tensors,
        (
            (r"encoder_q\.fc\.(.*)", r"head.\1"),
            (r"encoder_q\.(.*)", r"encoder.\1"),
            (r"encoder_k\.fc\.(.*)", r"key_encoder.1.\1"),
            (r"encoder_k\.(.*)", r"key_encoder.0.\1"),
            ("queue", "queue.features"),
            ("queue_ptr", "queue.pointer"),
        ),
    )
    values: Values = {}
    if "queue.features" in named:  # columns there, rows here
        named["queue.features"] = named["queue.features"].T.contiguous()
        values["queue_size"] = width(named, "queue.features")
    last = next((name for name in ("head.2.weight", "head.weight") if name in named), None)
    if last is not None:
        values["dim"] = width(named, last)
    return named, values


def simsiam(tensors: Tensors) -> tuple[Tensors, Values]:
    named = rename(
        tensors,
        ((r"encoder\.fc\.(.*)", r"projector.\1"), (r"(encoder|predictor)\.(.*)", r"\1.\2")),
    )
    values: Values = {}
    if layers := layers_of(named, "projector"):
        values["projector_layers"] = len(layers)
        values["dim"] = width(named, f"projector.{layers[-1]}.weight")
    if "predictor.0.weight" in named:
        values["hidden"] = width(named, "predictor.0.weight")
    return named, values


def swav(tensors: Tensors) -> tuple[Tensors, Values]:
    named = rename(
        tensors,
        (
            (r"projection_head\.(.*)", r"head.\1"),
            (r"prototypes\.(.*)", r"prototypes.\1"),
            (r"(.*)", r"encoder.\1"),
        ),
    )
    values: Values = {}
    if "head.3.weight" in named:
        values |= {"hidden": width(named, "head.0.weight"), "dim": width(named, "head.3.weight")}
    if "prototypes.weight" in named:
        values["prototypes"] = width(named, "prototypes.weight")
    return named, values


def moco_v3(tensors: Tensors) -> tuple[Tensors, Values]:
    named = rename(
        tensors,
        (
            (r"base_encoder\.(?:fc|head)\.(.*)", r"projector.\1"),
            (r"base_encoder\.(.*)", r"encoder.\1"),
            (r"momentum_encoder\.(?:fc|head)\.(.*)", r"key_encoder.1.\1"),
            (r"momentum_encoder\.(.*)", r"key_encoder.0.\1"),
        ),
    )
    values: Values = {}
    if layers := layers_of(named, "projector"):
        values["projector_layers"] = len(layers)
        values["hidden"] = width(named, "projector.0.weight")
        values["dim"] = width(named, f"projector.{layers[-1]}.weight")
    if layers := layers_of(named, "predictor"):
        values["predictor_layers"] = len(layers)
        values["predictor_last_norm"] = ends_in_norm(named, "predictor")
    return named, values


def dino(tensors: Tensors) -> tuple[Tensors, Values]:
    """Student and teacher, or a backbone: what was released is the teacher's, taken for both."""
    new = r"last_layer\.parametrizations\.weight\.original"  # torch's weight norm since 2.0
    tensors = rename(
        tensors,
        ((rf"(.*){new}0", r"\1last_layer.weight_g"), (rf"(.*){new}1", r"\1last_layer.weight_v")),
    )
    named = rename(
        tensors,
        (
            (r"student\.backbone\.(.*)", r"encoder.\1"),
            (r"student\.head\.(.*)", r"head.\1"),
            (r"teacher\.backbone\.(.*)", r"teacher.0.\1"),
            (r"teacher\.head\.(.*)", r"teacher.1.\1"),
            (r"(?:dino_loss\.)?center", "center"),
            (r"(.*)", r"teacher.0.\1"),
        ),
    )
    for ours, other in (("teacher.0.", "encoder."), ("teacher.1.", "head.")):
        if not any(name.startswith(other) for name in named):
            named |= {
                other + name.removeprefix(ours): tensor
                for name, tensor in list(named.items())
                if name.startswith(ours)
            }
    values: Values = {}
    if "center" in named:
        named["center"] = named["center"].flatten()
    if layers := layers_of(named, r"head\.mlp"):
        values["head_layers"] = len(layers)
        values["hidden"] = width(named, "head.mlp.0.weight")
        values["dim"] = width(named, f"head.mlp.{layers[-1]}.weight")
        values["head_norm"] = "head.mlp.1.running_mean" in named
    if "head.last_layer.weight_g" in named:
        values["outputs"] = width(named, "head.last_layer.weight_g")
        values["norm_last_layer"] = bool(named["head.last_layer.weight_g"].eq(1).all())
    return named, values


ONLINE = r"(?:online_(?:network|encoder|net)\.|online\.|)"
TARGET = r"(?:(?:target_(?:network|encoder|net)|target|momentum)[._])"
ENCODER = r"(?:encoder|backbone|net|f)"
PROJECTOR = r"(?:projector|projection_head|projection|projetion|neck|g)"
PREDICTOR = r"(?:online_predictor|predictor|prediction_head|q)"
INSIDE = r"(?:(?:net|layers|mlp)\.)?"


def byol(tensors: Tensors) -> tuple[Tensors, Values]:
    """Networks made in PyTorch; `haiku.flatten` first for what DeepMind released."""
    tensors = rename(tensors, ((r"(\w+)_momentum\.(.*)", r"momentum_\1.\2"),))
    named = rename(
        tensors,
        (
            (rf"{TARGET}{PROJECTOR}\.{INSIDE}(.*)", r"target.1.\1"),
            (rf"{TARGET}{ENCODER}\.(.*)", r"target.0.\1"),
            (rf"{ONLINE}{PREDICTOR}\.{INSIDE}(.*)", r"predictor.\1"),
            (rf"{ONLINE}{PROJECTOR}\.{INSIDE}(.*)", r"projector.\1"),
            (rf"{ONLINE}{ENCODER}\.(.*)", r"encoder.\1"),
        ),
    )
    # nn.Sequential(*resnet.children()) numbers the parts of the network.
    children = {
        "0": "conv1",
        "1": "bn1",
        "4": "layer1",
        "5": "layer2",
        "6": "layer3",
        "7": "layer4",
    }
    named = rename(
        named,
        tuple(
            (rf"(encoder|target\.0)\.{i}\.(.*)", rf"\1.{ours}.\2") for i, ours in children.items()
        ),
    )
    # Classifiers: torchvision's own, which nobody uses, and one beside the method.
    unused = r"(classifier|(encoder|target\.0)\.fc)\."
    named = {name: tensor for name, tensor in named.items() if not re.match(unused, name)}
    values: Values = {}
    if layers := layers_of(named, "projector"):
        values["hidden"] = width(named, "projector.0.weight")
        values["dim"] = width(named, f"projector.{layers[-1]}.weight")
    return named, values


FAMILIES: dict[str, Callable[[Tensors], tuple[Tensors, Values]]] = {
    "moco-v1": moco,
    "moco-v2": moco,
    "swav": swav,
    "byol": byol,
    "simsiam": simsiam,
    "moco-v3": moco_v3,
    "dino": dino,
}


def looks_like(names: set[str]) -> str | None:
    """The method whose released files have tensors of such names; None when none stands out."""

    def has(*patterns: str) -> bool:
        return all(any(re.match(pattern, name) for name in names) for pattern in patterns)

    if has(r"encoder_q\."):
        return "moco-v2" if has(r"encoder_q\.fc\.\d") else "moco-v1"
    if has(r"base_encoder\."):
        return "moco-v3"
    if has(r"projection_head\.", r"prototypes"):
        return "swav"
    if has(r"encoder\.fc\.\d", r"predictor\."):
        return "simsiam"
    if has(r"(student|teacher)\.(backbone|head)\.") or has(r"cls_token$"):
        return "dino"
    if has(rf"{ONLINE}{PREDICTOR}\."):
        return "byol"
    return None
