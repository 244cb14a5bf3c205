"""What a run looks like: report.png and report.html, from its folder.

    python -m fastcl.report runs/swav-fashion

Both show the curves of metrics.jsonl, a map of the features of test images, and test images with
their nearest neighbours among test images; report.html also has the numbers and the config, is one
file, and loads nothing from anywhere. The features are those of checkpoint.pt.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nf

from fastcl import checkpoint
from fastcl.data import DataSplits, Split, TensorSplit, load
from fastcl.evaluate import features_and_labels, load_encoder
from fastcl.progress import collapse_sentence, read_rows
from fastcl.tsne import tsne

if TYPE_CHECKING:
    from fastcl.pictures import Neighbours

PNG, HTML = "report.png", "report.html"
LOOKED_AT = 2000  # test images whose features are computed, evenly over the split
MAPPED = 1000  # of them in the map: its time grows with their square
QUERIES, NEAREST = 10, 8  # lines of the grid, neighbours in each

Row = dict[str, Any]


@dataclass(frozen=True)
class Features:
    """What the encoder makes of some test images."""

    places: Tensor  # (MAPPED, 2)
    labels: Tensor  # (MAPPED,)
    neighbours: Neighbours
    classes: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2, after one line, for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcl.report",
        description="Draw report.png and report.html from the folder of a run.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--data-dir", help="where the data is now; none: where the run had it")
    parser.add_argument("--device", default="cpu", help="where the encoder runs [cpu]")
    args = parser.parse_args(argv)
    try:
        require_matplotlib()
        written = write(args.folder, data_dir=args.data_dir, device=args.device)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        print(f"fastcl.report: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


def after_training(folder: Path, data: DataSplits, device: torch.device) -> str:
    """Write both at the end of a run; the line to print: where they are, or why they are not."""
    try:
        require_matplotlib()
        return str(write(folder, data, device=device)[-1])
    except (ImportError, ValueError, RuntimeError) as error:
        return f"no report: {' '.join(str(error).split())}"


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the report needs matplotlib: pip install 'fastcl[train]'")


def write(
    folder: Path,
    data: DataSplits | None = None,
    *,
    data_dir: str | None = None,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """report.png and report.html in folder, and their paths. data: the run's, where it is loaded.

    Without a checkpoint, or where the data is gone, they hold the curves and say what is missing.
    Raises ValueError when folder is not a run's, OSError when it cannot be written to.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no metrics.jsonl")
    rows = read_rows(path)
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    missing, features = "", None
    try:
        state = checkpoint.load(folder / checkpoint.NAME)
        if data is None:
            own = state["values"]
            columns = {key: own.get(key) for key in ("image_column", "label_column")}
            data = load(own["data"], data_dir=data_dir or own["data_dir"], **columns)
        features = look(state, data, device)
    except (OSError, ValueError) as error:
        missing = f"No map and no neighbours: {' '.join(str(error).split())}"
    images = draw(rows, features)
    replace(folder / PNG, png(together(images)))
    page = to_html(folder.resolve().name, rows, config, features, missing, images)
    replace(folder / HTML, page.encode())
    return [folder / PNG, folder / HTML]


def replace(path: Path, content: bytes) -> None:
    """The old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


# ---- what is drawn -------------------------------------------------------------------------------


def look(state: dict[str, Any], data: DataSplits, device: torch.device | str) -> Features:
    """The features of test images under the encoder of a checkpoint: their map and neighbours."""
    encoder, normalize = load_encoder(state, data)
    test = evenly(data.test, LOOKED_AT)
    features, labels = features_and_labels(
        encoder.to(device), test, normalize=normalize, device=device, batch_size=250
    )
    features = nf.normalize(features, dim=1)
    mapped = torch.arange(0, len(features), max(1, -(-len(features) // MAPPED)))
    places = tsne(features[mapped]) if len(mapped) >= 3 else torch.zeros(len(mapped), 2)
    return Features(places, labels[mapped], nearest(features, labels, test), data.classes)


def evenly(split: Split, most: int) -> Split:
    """At most so many of the split's images, evenly spaced, without those that cannot be read."""
    keep = torch.arange(0, len(split), max(1, -(-len(split) // most)))
    part = split.subset(keep)
    if isinstance(part, TensorSplit):
        return part
    images, labels = zip(*part.batches(250))
    return TensorSplit(torch.cat(images), torch.cat(labels))


def nearest(features: Tensor, labels: Tensor, test: Split) -> Neighbours:
    """features (N, D), unit: the first images of each class, or of some, and those nearest them."""
    from fastcl.pictures import Neighbours

    assert isinstance(test, TensorSplit)
    similarity = (features @ features.T).fill_diagonal_(-torch.inf)
    order = similarity.topk(min(NEAREST, len(features) - 1), 1).indices  # (N, k), nearest first
    known = labels.unique()
    known = known[known >= 0]
    if len(known) > 1:
        some = known[torch.linspace(0, len(known) - 1, min(QUERIES, len(known))).long()]
        each = QUERIES // len(some)
        queries = torch.cat([(labels == c).nonzero()[:each, 0] for c in some])
        with_label = labels >= 0
        right = float((labels[order] == labels[:, None])[with_label].float().mean())
    else:
        queries = torch.linspace(0, len(features) - 1, min(QUERIES, len(features))).long()
        right = None
    shown = torch.cat((queries[:, None], order[queries]), 1)  # (Q, 1 + k)
    return Neighbours(test.images[shown], labels[shown], right, len(features))


def draw(rows: Sequence[Row], features: Features | None) -> dict[str, NDArray[np.uint8]]:
    """The pictures by name, (height, width, 3) each: curves, and of features map and neighbours."""
    from fastcl import pictures

    with pictures.style():
        found = {"curves": pictures.draw((15, 6.6), pictures.curves, rows)}
        if features is not None:
            f = features
            found["map"] = pictures.draw(
                (8, 8), pictures.feature_map, f.places, f.labels, f.classes
            )
            found["neighbours"] = pictures.draw(
                (7, 8), pictures.neighbour_grid, f.neighbours, f.classes
            )
    return found


def together(images: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """report.png: the curves above, the map and the neighbours below."""
    if "map" not in images:
        return images["curves"]
    return np.vstack((images["curves"], np.hstack((images["map"], images["neighbours"]))))


def png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


# ---- the page ------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
 max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.7rem; margin: 0 }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
.about {{ color: #555; margin: 0 0 1rem }}
.collapse {{ border-left: 4px solid {tone}; padding: .4rem .8rem; background: #f6f6f6 }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
th, td {{ text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #ddd }}
td {{ font-variant-numeric: tabular-nums }}
img {{ width: 100%; min-width: 600px; height: auto; display: block }}
#map, #neighbours {{ max-width: 800px }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
<p class="collapse" id="collapse">{collapse}</p>
<h2>Numbers</h2>
<div class="wide"><table id="numbers">
{numbers}
</table></div>
<h2>Training</h2>
{curves}
{features}
<h2>Evaluations</h2>
<div class="wide"><table id="evaluations">
<tr><th scope="col">epoch</th><th scope="col">step</th><th scope="col">kNN accuracy</th></tr>
{evaluations}
</table></div>
<details open><summary>Config</summary><pre id="config">{config}</pre></details>
</body>
</html>
"""


def to_html(
    name: str,
    rows: Sequence[Row],
    config: str,
    features: Features | None,
    missing: str,
    images: dict[str, NDArray[np.uint8]],
) -> str:
    """The page; `images` are draw's; `missing` says why there are no features, if so."""
    values = values_of(config)
    last = next((row for row in reversed(rows) if "loss" in row), {})
    sentence = collapse_sentence(last)
    about = (
        f"{values['method']} on {values['data']}, {values['backbone']}, recipe {values['recipe']}, "
        f"{last.get('epoch', 0):g} of {values['epochs']} epochs"
    )
    numbers = list(final_numbers(rows))
    spoken = ", ".join(f"{what} {shown}" for what, shown, _ in numbers)
    if features is None:
        part = f"<p>{html.escape(missing)}</p>"
    else:
        part = (
            "<h2>Features of test images</h2>\n"
            f"{image('map', images['map'], 'Map of the features, coloured by class')}\n"
            "<h2>Nearest neighbours</h2>\n"
            f"{image('neighbours', images['neighbours'], grid_in_words(features.neighbours))}"
        )
    return PAGE.format(
        title=html.escape(name),
        tone="#009e73" if "not collapsed" in sentence else "#d55e00",
        about=html.escape(about),
        collapse=html.escape(sentence),
        numbers="\n".join(
            f'<tr><th scope="row">{html.escape(what)}</th>'
            f'<td data-value="{json.dumps(value)}">{html.escape(shown)}</td></tr>'
            for what, shown, value in numbers
        ),
        curves=image("curves", images["curves"], f"Curves of the run: {spoken}"),
        features=part,
        evaluations="\n".join(
            f"<tr><td>{row['epoch']:g}</td><td>{row['step']:,}</td>"
            f'<td data-value="{json.dumps(row["knn_top1"])}">{row["knn_top1"]:.2%}</td></tr>'
            for row in rows
            if row.get("knn_top1") is not None
        ),
        config=html.escape(config),
    )


def final_numbers(rows: Sequence[Row]) -> Iterator[tuple[str, str, float]]:
    """(what, as it is shown, the value in metrics.jsonl) of what the run came to."""
    found = [row for row in rows if row.get("knn_top1") is not None]
    trained = [row for row in found if row["step"] > 0]
    if trained:
        best = max(trained, key=lambda row: row["knn_top1"])
        yield "kNN, trained encoder", f"{trained[-1]['knn_top1']:.1%}", trained[-1]["knn_top1"]
        shown = f"{best['knn_top1']:.1%} at epoch {best['epoch']:g}"
        yield "kNN, best", shown, best["knn_top1"]
    if found and found[0]["step"] == 0:
        yield "kNN, untrained encoder", f"{found[0]['knn_top1']:.1%}", found[0]["knn_top1"]
    for row in rows:
        if "knn_top1_raw_pixels" in row:
            yield "kNN, raw pixels", f"{row['knn_top1_raw_pixels']:.1%}", row["knn_top1_raw_pixels"]
    last = next((row for row in reversed(rows) if "loss" in row), {})
    for what, key, form in (
        ("loss", "loss", ".4f"),
        ("learning rate", "lr", ".3g"),
        ("momentum", "momentum", ".5g"),
        ("feature standard deviation", "feature_std", ".4f"),
        ("effective rank", "effective_rank", ".1f"),
        ("images per second", "images_per_second", ",.0f"),
        ("steps", "step", ",d"),
    ):
        if last.get(key) is not None:
            yield what, format(last[key], form), last[key]


def values_of(config: str) -> Row:
    """config.yaml as the trainer writes it: `key: JSON` lines."""
    pairs = (line.split(": ", 1) for line in config.splitlines() if ": " in line)
    return {key: json.loads(value) for key, value in pairs}


def grid_in_words(found: Neighbours) -> str:
    words = f"{len(found.labels)} test images, each with its nearest neighbours"
    return words + ("" if found.right is None else f"; {found.right:.1%} of all are of its class")


def image(name: str, pixels: NDArray[np.uint8], alt: str) -> str:
    data = base64.b64encode(png(pixels)).decode()
    source = f"data:image/png;base64,{data}"
    return f'<div class="wide"><img id="{name}" alt="{html.escape(alt)}" src="{source}"></div>'


if __name__ == "__main__":
    sys.exit(main())
