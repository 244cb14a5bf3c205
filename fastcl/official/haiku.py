"""BYOL as DeepMind released it: Haiku's trees of arrays, read as PyTorch's state.

    module              PyTorch                    array               PyTorch
    initial_conv        conv1                      w (h, w, in, out)   weight (out, in, h, w)
    block_group_0/      layer1.                    w (in, out)         weight (out, in)
    block_1/conv_2      1.conv3                    scale, offset       weight, bias
    shortcut_conv       downsample.0               mean_ema/average    running_mean

Its convolutions and its pool have TensorFlow's padding: the odd pixel is added at the bottom and at
the right, where PyTorch adds as many on both sides. `same_padding_` gives a network that padding.

Source: google-deepmind/deepmind-research, byol; Haiku's ResNet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as nf

M = TypeVar("M", bound=nn.Module)

TREES = {  # of the released file -> the networks' names in PyTorch
    "online_params": "online_network",
    "online_state": "online_network",
    "target_params": "target_network",
    "target_state": "target_network",
}
UNUSED = ("target_network", "predictor")
MODULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"res_net\d+/", "encoder/"),
    (r"block_group_(\d+)/", lambda m: f"layer{int(m[1]) + 1}/"),
    (r"block_(\d+)/", r"\1/"),
    ("initial_conv", "conv1"),
    ("initial_batchnorm", "bn1"),
    ("shortcut_conv", "downsample/0"),
    ("shortcut_batchnorm", "downsample/1"),
    (r"conv_(\d+)", lambda m: f"conv{int(m[1]) + 1}"),
    (r"batchnorm_(\d+)", lambda m: f"bn{int(m[1]) + 1}"),
    ("/linear_1", "/3"),
    ("/linear", "/0"),
    ("/batch_norm", "/1"),
)
ARRAYS = {
    "w": "weight",
    "b": "bias",
    "scale": "weight",
    "offset": "bias",
    "mean_ema/average": "running_mean",
    "var_ema/average": "running_var",
}


def is_haiku(state: Mapping[str, Any]) -> bool:
    """Whether state holds the trees of DeepMind's file."""
    return "online_params" in state


def flatten(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"online_params": {module: {name: array}}, …} -> {"online_network.encoder.conv1.weight": …}.

    Arrays are anything that numpy.asarray takes. Left out are the classifier beside the method and
    the target's predictor, which it never uses.
    """
    tensors = {}
    for tree, network in TREES.items():
        for module, arrays in state.get(tree, {}).items():
            for array, value in arrays.items():
                path = f"{module}/{array}".replace("~/", "")
                kind = next((kind for kind in ARRAYS if path.endswith("/" + kind)), None)
                if kind is None:  # an average's counter, its value before the correction
                    continue
                name = _module(path.removesuffix(kind)) + ARRAYS[kind]
                if name.startswith("classifier") or (network, name[:9]) == UNUSED:
                    continue
                weight = torch.from_numpy(numpy.array(value, dtype=numpy.float32))
                tensors[f"{network}.{name}"] = (
                    _oriented(weight) if kind == "w" else weight.flatten()
                )
    return tensors


def _module(path: str) -> str:
    """PyTorch's name of a module, with a dot at its end as path has a slash."""
    for pattern, replacement in MODULES:
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


def _oriented(weight: Tensor) -> Tensor:
    """(h, w, in, out) -> (out, in, h, w); (in, out) -> (out, in)."""
    return weight.permute(3, 2, 0, 1).contiguous() if weight.ndim == 4 else weight.T.contiguous()


class _Same:
    """Before a layer: pads its input with `value` as TensorFlow's SAME, the odd pixel last."""

    def __init__(self, layer: nn.Conv2d | nn.MaxPool2d) -> None:
        self.size, self.stride = _one(layer.kernel_size), _one(layer.stride)
        self.value = -math.inf if isinstance(layer, nn.MaxPool2d) else 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        pads: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            out = -(-side // self.stride)
            total = max((out - 1) * self.stride + self.size - side, 0)
            pads += [total // 2, total - total // 2]
        return nf.pad(x, pads, value=self.value)


def _one(size: Any) -> int:
    side: int = size[0] if isinstance(size, tuple) else size
    return side


def same_padding_(network: M) -> M:
    """Give every convolution and max-pool with a stride TensorFlow's padding; names stay.

    Returns network, changed in place.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and _one(layer.stride) > 1:
            layer.register_forward_pre_hook(_Same(layer))
            layer.padding = (0, 0)
    return network
