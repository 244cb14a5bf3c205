"""Checkpoints that the papers' authors released, as methods of this library.

    method, absent = load_official("moco_v2_800ep_pretrain.pth.tar", "moco-v2")
    features = method.encoder(images)

What the file has goes where it belongs: encoder, head, predictor, prototypes, momentum copy, queue,
centre. Backbone and sizes are read off its tensors.

    python -m fastcl.official FILE --method moco-v2       a run folder, for evaluate and export

Read with weights_only=True: a file cannot run code here. Of what is not a tensor or a number only
argparse.Namespace is let in, which DINO's files hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import models
from fastcl.methods import METHODS, Config, Method
from fastcl.models import vit_moco_v3
from fastcl.official import haiku
from fastcl.official.names import FAMILIES, Tensors, looks_like

__all__ = ["load_official"]

TRANSFORMERS = {"dino": models.DINO, "moco-v3": tuple(vit_moco_v3.SIZES)}
RECIPES = {("moco-v3", "vit"): "paper-vit", ("dino", "resnet"): "paper-resnet"}
COPIES = {  # momentum copies, and what they are copies of; a file that lacks one gets it from there
    "key_encoder": ("encoder", {"moco-v1": "head", "moco-v2": "head", "moco-v3": "projector"}),
    "target": ("encoder", {"byol": "projector"}),
    "teacher": ("encoder", {"dino": "head"}),
}
PARTS = ("student", "teacher", "dino_loss", "online_network", "target_network")
COUNTERS = "num_batches_tracked"  # which nothing depends on


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Any], method: str
) -> tuple[Method, list[str]]:
    """(method, absent): a released checkpoint as a method, and the parts that it does not have.

    source   the file, or what torch.load makes of it: the tensors by name, or a dictionary with
             them as "state_dict" (MoCo, SimSiam, SwAV, MoCo v3), "student" and "teacher" (DINO) or
             "model"; for BYOL also DeepMind's trees of arrays ("online_params", …), unpickled
    method   moco-v1, moco-v2, swav, byol, simsiam, moco-v3 or dino

    absent names parts of the method as `named_children` does ("queue", "head"); they are as new,
    but for a momentum copy, which is then a copy of what was loaded.
    Raises ValueError for a file that cannot be read, is of another method, has an encoder that
    there is none of here, or lacks tensors of a part that it has; FileNotFoundError.
    """
    if method not in FAMILIES:
        raise ValueError(f"no released files are known of {method!r}; of {', '.join(FAMILIES)}")
    state = source if isinstance(source, Mapping) else read(Path(source))
    from_haiku = method == "byol" and haiku.is_haiku(state)
    tensors = _without_wrappers(haiku.flatten(state) if from_haiku else _tensors(state))
    guess = looks_like(set(tensors))
    if guess is not None and FAMILIES[guess] is not FAMILIES[method]:
        raise ValueError(f"this is no checkpoint of {method}: its names are those of {guess}")
    named, values = FAMILIES[method](tensors)
    encoder = {k.removeprefix("encoder."): v for k, v in named.items() if k.startswith("encoder.")}
    if not encoder:
        some = ", ".join(list(tensors)[:4]) or "none at all"
        raise ValueError(
            f"this is no checkpoint of {method}: it has no encoder. Its tensors: {some}, …"
        )
    config, image_size = _config(method, encoder, values)
    cls = METHODS[method]
    made = cls(cls.build_encoder(config, image_size), config)
    _biases_of_byol(made, named)
    if from_haiku:
        haiku.same_padding_(made)
    return made, _fill(made, named, method)


def read(path: Path) -> Mapping[str, Any]:
    """What is in a file. Raises ValueError when it is none of torch.save, or holds code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds on a file that is not its own
        reason = " ".join(str(error).split())
        where = reason.find("Unsupported")
        where = max(where, reason.find("GLOBAL"))
        short = reason[where : where + 120] if where >= 0 else reason[:120]
        raise ValueError(
            f"{path} cannot be read without running code that it holds, or is damaged: "
            f"{short}. If you trust it, load it yourself with torch.load(…, weights_only=False) "
            "and give the dictionary"
        ) from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    return state


def _tensors(state: Mapping[str, Any]) -> Tensors:
    """The tensors of a file by name; those of DINO's student and teacher with that before them."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), Mapping):
            return _tensors(state[key])
    parts = {
        key: value
        for key, value in state.items()
        if isinstance(value, Mapping) and key.removesuffix("_state_dict") in PARTS
    }
    if parts:
        return {
            f"{part.removesuffix('_state_dict')}.{name}": tensor
            for part, inside in parts.items()
            for name, tensor in _without_wrappers(_tensors(inside)).items()
        }
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _without_wrappers(tensors: Tensors) -> Tensors:
    """Names without what DistributedDataParallel and torch.compile put before them."""

    def bare(name: str) -> str:
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        return name

    return {bare(name): tensor for name, tensor in tensors.items()}


def _config(method: str, encoder: Tensors, values: dict[str, Any]) -> tuple[Config, int]:
    """The Config that such an encoder and such sizes are of, and the side of its images."""
    kind = "vit" if "cls_token" in encoder else "resnet"
    recipes = METHODS[method].recipes
    config = recipes[RECIPES.get((method, kind), "paper")]
    small = "conv1.weight" in encoder and encoder["conv1.weight"].shape[-1] == 3
    size = 32 if small else 224
    if kind == "vit":
        candidates: Iterable[str] = TRANSFORMERS.get(method, ())
        patch = encoder.get("patch_embed.proj.weight")
        if patch is not None and "pos_embed" in encoder:
            size = round((encoder["pos_embed"].shape[1] - 1) ** 0.5) * patch.shape[-1]
    else:
        candidates = models.TORCHVISION
    theirs = {k: v.shape for k, v in encoder.items() if not k.endswith(COUNTERS)}
    off = {name: _shapes(name, size).items() ^ theirs.items() for name in candidates}
    backbone = min(off, key=lambda name: len(off[name]), default=None)
    if backbone is None or off[backbone]:
        raise ValueError(
            f"the encoder of this file is none that {method} is loaded into "
            f"({', '.join(off) or 'no transformer'})"
            + (
                f"; nearest is {backbone}: {_difference(backbone, size, theirs)}"
                if backbone
                else ""
            )
        )
    return dataclasses.replace(config, backbone=backbone, image_size=size, **values), size


def _difference(name: str, image_size: int, theirs: dict[str, torch.Size]) -> str:
    """In what such an encoder is not the file's: the first tensor that tells them apart."""
    ours = _shapes(name, image_size)
    for key, shape in theirs.items():
        if key not in ours:
            return f"the file has {key} {tuple(shape)} too"
        if ours[key] != shape:
            return f"{key} is {tuple(shape)} in the file and {tuple(ours[key])} there"
    return f"the file has no {next(key for key in ours if key not in theirs)}"


@functools.cache
def _shapes(name: str, image_size: int) -> dict[str, torch.Size]:
    """The tensors of an encoder here, without their values."""
    with torch.device("meta"):
        ours = models.build(name, image_size=image_size).state_dict()
    return {k: v.shape for k, v in ours.items() if not k.endswith(COUNTERS)}


def _biases_of_byol(method: Method, named: Tensors) -> None:
    """Many BYOLs in PyTorch have a bias in the last layer of a head, where the code has none."""
    for part, ours in (("projector", "projector"), ("target.1", "target"), ("predictor",) * 2):
        bias = named.get(f"{part}.3.bias")
        if bias is not None and hasattr(method, ours):
            head = method.get_submodule(part)
            old = head.get_parameter("3.weight")
            last = nn.Linear(old.shape[1], len(bias)).requires_grad_(old.requires_grad)
            head.add_module("3", last)


def _fill(method: Method, named: Tensors, name: str) -> list[str]:
    """Load named into method. Returns the parts without tensors there."""
    own = method.state_dict()
    if unexpected := [key for key in named if key not in own]:
        raise ValueError(
            f"{len(unexpected)} tensors of this file have no place in {name}: "
            f"{', '.join(unexpected[:3])}{', …' if len(unexpected) > 3 else ''}"
        )
    for key, tensor in named.items():
        if own[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has the shape {tuple(tensor.shape)} in this file, where {name} with "
                f"{method.config.backbone} has {tuple(own[key].shape)}"
            )
    missing: dict[str, list[str]] = {}
    for key in own:
        if key not in named and not key.endswith(COUNTERS):
            missing.setdefault(_part(key), []).append(key)
    present = {_part(key) for key in named}
    for part, keys in missing.items():
        if part in present:
            raise ValueError(
                f"this file lacks {len(keys)} tensors of {name}'s {part}: "
                f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
            )
    method.load_state_dict(named, strict=False)
    for copy, (encoder, heads) in COPIES.items():
        for part, source in ((f"{copy}.0", encoder), (f"{copy}.1", heads.get(name))):
            if part in missing and source is not None:
                state = method.get_submodule(source).state_dict()
                method.get_submodule(part).load_state_dict(state)
    return list(dict.fromkeys(part.partition(".")[0] for part in missing))


def _part(key: str) -> str:
    """encoder.conv1.weight -> encoder; key_encoder.1.fc.weight -> key_encoder.1."""
    first, _, rest = key.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in COPIES else first
