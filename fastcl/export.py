"""python -m fastcl.export RUN --to timm: the encoder of a run, for other programs.

    torchvision   a state dict that torchvision.models.<backbone>(…) loads; ResNets on images of
                  more than 64 pixels, whose stem is torchvision's
    timm          a state dict that timm.create_model(…, num_classes=0) loads: those ResNets, the
                  transformers of MoCo v3 and DINO, and every backbone timm/<name>
    safetensors   every encoder, under the names it has here; what it was trained as is metadata
    onnx          every encoder as a graph, images (N, C, side, side) float32 -> features (N, D) for
                  any N; its output is compared with PyTorch's before the file is kept

Images must be normalised as in training: values in [0, 1], less the data's mean, over its std, in
the run's colours. What is exported is what the method keeps (DINO: the teacher), without its head.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import checkpoint
from fastcl.config import with_values
from fastcl.data import load
from fastcl.data.colours import CHANNELS
from fastcl.evaluate import restore
from fastcl.methods import METHODS
from fastcl.models import SMALL_IMAGE, TORCHVISION
from fastcl.models.selective import LAYERS as SELECTIVE
from fastcl.models.vit_dino import SIZES as DINO
from fastcl.models.vit_moco_v3 import SIZES as MOCO_V3

ENDS = {"torchvision": "pth", "timm": "pth", "safetensors": "safetensors", "onnx": "onnx"}
TIMM = {(192, 16): "vit_tiny_patch16_224", (384, 16): "vit_small_patch16_224",
        (768, 16): "vit_base_patch16_224", (384, 8): "vit_small_patch8_224",
        (768, 8): "vit_base_patch8_224"}  # fmt: skip  # dim, patch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2, after one line, for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcl.export",
        description="Write the encoder of a run in the form of another library.",
    )
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("--to", choices=ENDS, required=True)
    parser.add_argument("--output", type=Path, help="file; none: encoder-TO in the run folder")
    parser.add_argument("--image-size", type=int, help="side of the images; none: the run's")
    args = parser.parse_args(argv)
    try:
        path = args.run / checkpoint.NAME if args.run.is_dir() else args.run
        output = args.output or path.with_name(f"encoder-{args.to}.{ENDS[args.to]}")
        print(export(checkpoint.load(path), args.to, output, args.image_size))
    except (ValueError, OSError) as error:
        print(f"fastcl.export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(output)
    return 0


def export(state: dict[str, Any], to: str, output: Path, image_size: int | None = None) -> str:
    """Write the encoder of a checkpoint's state; returns a line that says how to load the file.

    Raises ValueError where that form has no such encoder, or needs what is not installed.
    """
    method = METHODS[state["values"]["method"]]
    config = with_values(method.recipes["paper"], state["values"])
    values = state["values"] | dataclasses.asdict(config)
    size: int = image_size or values["image_size"]
    size = size or load(values["data"], data_dir=values["data_dir"]).image_size
    encoder = restore(state, size).eval()
    return WRITERS[to](encoder, values, size, output)


def _plain(values: dict[str, Any], size: int, library: str) -> str:
    """The name of a backbone that is the library's own. Raises ValueError when it is not."""
    name: str = values["backbone"]
    reasons = {
        f"{values['method']}'s encoder is not one network": values["method"] in ("cmc", "cpc"),
        f"its norms are {values.get('encoder_norm')}": values.get("encoder_norm", "bn") != "bn",
        "SimCLR v2's ResNets have names of their own": values["method"] == "simclr-v2"
        and name in SELECTIVE,
        f"its width is {values.get('width')}": values.get("width", 1) != 1,
        f"it takes {values['colours']} images": CHANNELS[values["colours"]] != 3,
        f"for images of at most {SMALL_IMAGE} pixels its stem is another": name in TORCHVISION
        and size <= SMALL_IMAGE,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"{library} has no such encoder: {reason}. --to safetensors and onnx take any"
            )
    return name


def _save(encoder: nn.Module, output: Path) -> None:
    torch.save(_weights(encoder), output)


def _weights(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}


def to_torchvision(encoder: nn.Module, values: dict[str, Any], size: int, output: Path) -> str:
    name = _plain(values, size, "torchvision")
    if name not in TORCHVISION:
        raise ValueError(
            f"torchvision's ResNets are {', '.join(TORCHVISION)}; this run's backbone is {name}. "
            "--to safetensors and onnx take any"
        )
    _save(encoder, output)
    return (
        f"model = torchvision.models.{name}(); "
        f"model.load_state_dict(torch.load({str(output)!r}), strict=False)  # fc stays as it is"
    )


def to_timm(encoder: nn.Module, values: dict[str, Any], size: int, output: Path) -> str:
    name, options = _timm_model(_plain(values, size, "timm"), size)
    _save(encoder, output)
    given = "".join(f", {key}={value}" for key, value in options.items())
    return f"timm.create_model({name!r}, num_classes=0{given}, checkpoint_path={str(output)!r})"


def _timm_model(name: str, size: int) -> tuple[str, dict[str, Any]]:
    """timm's name for a backbone, and what else create_model must be given. Raises ValueError."""
    import timm

    if name.startswith("timm/"):
        name = name.removeprefix("timm/")
        config = timm.get_pretrained_cfg(name)
        fixed = config is not None and config.fixed_input_size
        return name, {"img_size": size} if fixed else {}
    if name in DINO:
        dim, _, patch = DINO[name]
        return TIMM[dim, patch], {"img_size": size}
    if name in MOCO_V3:
        dim, _, heads = MOCO_V3[name]
        return TIMM[dim, 16], {"img_size": size, "num_heads": heads}
    if name in TORCHVISION and timm.is_model(name):
        return name, {}
    raise ValueError(f"timm has no such encoder as {name}; --to safetensors and onnx take any")


def to_safetensors(encoder: nn.Module, values: dict[str, Any], size: int, output: Path) -> str:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError(
            "--to safetensors needs the package: pip install 'fastcl[export]'"
        ) from None
    metadata = {"format": "pt", "image_size": str(size), "values": json.dumps(values)}
    save_file(_weights(encoder), output, metadata)
    return f"safetensors.torch.load_file({str(output)!r})  # {values['backbone']}, {size} pixels"


def to_onnx(encoder: nn.Module, values: dict[str, Any], size: int, output: Path) -> str:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install 'fastcl[export]'") from None
    images = torch.rand(2, CHANNELS[values["colours"]], size, size)
    partial = output.with_name(output.name + ".tmp")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (images,),
            partial,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    more = torch.rand(3, *images.shape[1:])
    session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        truth = encoder(more)
    features = torch.from_numpy(session.run(None, {"images": more.numpy()})[0])
    off = ((features - truth).norm() / truth.norm()).item()
    if not off < 1e-4:
        raise ValueError(f"the graph's features are {off:.1e} off PyTorch's; {partial} is kept")
    partial.replace(output)
    shape = ", ".join(map(str, images.shape[1:]))
    return f"onnxruntime.InferenceSession({str(output)!r})  # images: float32 (N, {shape})"


WRITERS: dict[str, Callable[[nn.Module, dict[str, Any], int, Path], str]] = {
    "torchvision": to_torchvision,
    "timm": to_timm,
    "safetensors": to_safetensors,
    "onnx": to_onnx,
}


if __name__ == "__main__":
    sys.exit(main())
