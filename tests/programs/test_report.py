"""report.png, report.html and TensorBoard's events: they show the run that is in the folder."""

import base64
import builtins
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from fastcl import checkpoint, pictures, report, train
from fastcl.data import TensorSplit, load
from fastcl.evaluate import features, load_encoder
from fastcl.progress import collapse_sentence, read_rows

CLASSES = ("<b>bold", "$x_1$ & y", "_plain")  # what a page and matplotlib could take for markup
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of 16-pixel images: noise that is brighter in a third of the image."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (16, 16, 3))
                pixels[5 * label : 5 * label + 5] += 20
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def flags(images, folder, extra=""):
    small = "--backbone tiny-resnet --batch-size 12 --epochs 3 --log-every 2 --eval-every 1"
    data = f"--workers 0 --data folder --data-dir {images} --output {folder}"
    method = "--method moco-v2 --dim 16 --queue-size 20 --bn-splits 2"
    return f"{method} {small} {data} {extra}".split()


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run to its end: 12 steps, kNN before and after each of 3 epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(flags(images, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """What is on a page: text by id, every attribute, numbers by row of a table."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.tags, self.text, self.values = [], [], {}, []
        self.inside, self.line = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attributes.items()]
        if tag not in ("meta", "img"):
            self.inside.append(attributes.get("id"))
        if tag == "tr":
            self.line = []
        if "data-value" in attributes:
            self.values.append((list(self.line), json.loads(attributes["data-value"])))

    def handle_endtag(self, tag):
        self.inside.pop()

    def handle_data(self, data):
        self.line.append(data)
        for name in filter(None, self.inside):
            self.text[name] = self.text.get(name, "") + data


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def images_of(page):
    """The page's pictures by id, decoded."""
    ids = [value for tag, key, value in page.attributes if (tag, key) == ("img", "id")]
    sources = [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    decoded = (base64.b64decode(source.removeprefix(prefix)) for source in sources)
    return {i: np.asarray(Image.open(io.BytesIO(d))) for i, d in zip(ids, decoded, strict=True)}


def drawn(into, *what):
    """The axes that a function of pictures.py makes."""
    with pictures.style():
        return into(Figure(layout="constrained"), *what)


# ---- the page ------------------------------------------------------------------------------------


def test_numbers_of_the_page_are_those_of_metrics(page, rows):
    accuracies = [row for row in rows if "knn_top1" in row]
    last = [row for row in rows if "loss" in row][-1]
    assert len(accuracies) == 4 and last["step"] == 12
    numbers = {line[0]: value for line, value in page.values[: -len(accuracies)]}
    assert numbers == {
        "kNN, trained encoder": accuracies[-1]["knn_top1"],
        "kNN, best": max(row["knn_top1"] for row in accuracies[1:]),
        "kNN, untrained encoder": accuracies[0]["knn_top1"],
        "kNN, raw pixels": accuracies[0]["knn_top1_raw_pixels"],
        "loss": last["loss"],
        "learning rate": last["lr"],
        "momentum": last["momentum"],
        "feature standard deviation": last["feature_std"],
        "effective rank": last["effective_rank"],
        "images per second": last["images_per_second"],
        "steps": 12,
    }
    assert f"{last['loss']:.4f}" in page.text["numbers"]
    evaluations = [value for _, value in page.values[-len(accuracies) :]]
    assert evaluations == [row["knn_top1"] for row in accuracies]
    assert page.text["collapse"] == collapse_sentence(last)


def test_best_is_the_first_of_the_highest_after_training_began():
    accuracies = (0.9, 0.3, 0.5, 0.5, 0.4)  # untrained first
    rows = [{"step": 4 * i, "epoch": i, "knn_top1": a} for i, a in enumerate(accuracies)]
    found = {what: (shown, value) for what, shown, value in report.final_numbers(rows)}
    assert found == {
        "kNN, trained encoder": ("40.0%", 0.4),
        "kNN, best": ("50.0% at epoch 2", 0.5),
        "kNN, untrained encoder": ("90.0%", 0.9),
    }


def test_page_holds_the_config_and_the_classes_as_text(page, run):
    assert page.text["config"] == (run / "config.yaml").read_text()
    assert "b" not in page.tags


def test_page_needs_nothing_from_anywhere(page, run):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text.split("<body>")[0])
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for tag, key, value in page.attributes:
        assert key not in ("href", "srcset", "onload", "style")
        if key == "src":
            assert tag == "img" and value.startswith("data:image/png;base64,")
    policy = dict((k, v) for _, k, v in page.attributes if k == "content" and "default-src" in v)
    assert policy["content"].startswith("default-src 'none'")


def test_png_shows_the_pictures_of_the_page(page, run):
    parts = images_of(page)
    assert list(parts) == ["curves", "map", "neighbours"]
    whole = np.asarray(Image.open(run / "report.png"))
    height = len(parts["curves"])
    assert np.array_equal(whole[:height], parts["curves"])
    below = np.hstack((parts["map"], parts["neighbours"]))
    assert np.array_equal(whole[height:], below)
    assert all(part.std() > 10 for part in parts.values())  # none is blank


# ---- the pictures --------------------------------------------------------------------------------


def test_curves_are_the_rows_of_metrics(rows):
    rows = [row | {"loss_if_collapsed": 8.5} if "loss" in row else row for row in rows]
    panels = drawn(pictures.curves, rows)
    steps = [row for row in rows if "loss" in row]
    found = [row for row in rows if "knn_top1" in row]
    assert list(panels) == [
        *("loss", "knn", "lr", "feature_std", "effective_rank", "images_per_second"),
    ]
    for name, panel in panels.items():
        curve, *lines = panel.get_lines()
        key, own = ("knn_top1", found) if name == "knn" else (name, steps)
        assert curve.get_xydata().tolist() == [[row["epoch"], row[key]] for row in own]
        low, high = panel.get_ylim()
        assert all(low <= row[key] <= high for row in own)
        shown = [line.get_ydata()[0] for line in lines]
        assert all(low <= y <= high for y in shown)
        assert shown == {
            "loss": [8.5],
            "knn": [found[0]["knn_top1"], found[0]["knn_top1_raw_pixels"]],
            "feature_std": [16**-0.5],
            "effective_rank": [12],
        }.get(name, [])
    (momentum,) = (a for a in panels["lr"].figure.axes if a not in panels.values())
    assert momentum.get_lines()[0].get_ydata().tolist() == [row["momentum"] for row in steps]


def test_map_has_every_image_in_the_colour_of_its_class():
    torch.manual_seed(0)
    places, labels = torch.randn(30, 2), torch.arange(30) % 4 - 1  # −1: no label
    panel = drawn(pictures.feature_map, places, labels, CLASSES)
    colours = set()
    for label, points in zip((-1, 0, 1, 2), panel.collections, strict=True):
        offsets = torch.tensor(np.asarray(points.get_offsets()))
        assert torch.equal(offsets, places[labels == label].double())
        colours.add(matplotlib.colors.to_hex(points.get_facecolor()[0]))
    assert len(colours) == 4
    (legend,) = panel.figure.legends
    shown = [text.get_text().strip().replace(r"\$", "$") for text in legend.get_texts()]
    assert shown == ["no label", *CLASSES]


@pytest.mark.parametrize("classes", [15, 100])
def test_legend_fits_or_is_left_out(classes):
    names = tuple(f"a name that is longer than one would like {i}" for i in range(classes))
    figure = Figure((8, 8), layout="constrained")
    labels = torch.arange(classes)
    pictures.feature_map(figure, torch.randn(classes, 2), labels, names)
    if classes > pictures.MANY:
        assert not figure.legends
        assert "100 classes" in figure.axes[0].get_xlabel()
    else:
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_neighbours_are_test_images_and_the_nearest(run, images):
    data = load("folder", data_dir=images)
    state = checkpoint.load(run / "checkpoint.pt")
    found = report.look(state, data, "cpu").neighbours
    encoder, normalize = load_encoder(state, data)
    z = features(encoder, data.test, normalize=normalize).double()
    position = {image.numpy().tobytes(): i for i, image in enumerate(data.test.images)}
    assert found.images.shape == (9, 9, 3, 16, 16)  # three of each class; eight neighbours
    for shown, labels in zip(found.images, found.labels, strict=True):
        query, *nearest = (position[image.numpy().tobytes()] for image in shown)
        similarity = z @ z[query]
        similarity[query] = -2
        order = similarity.sort(descending=True)
        assert torch.allclose(similarity[nearest], order.values[:8], atol=1e-6)
        assert len({query, *nearest}) == 9
        assert labels.tolist() == data.test.labels[[query, *nearest]].tolist()
    similarity = (z @ z.T).fill_diagonal_(-2)
    same = data.test.labels[similarity.topk(8).indices] == data.test.labels[:, None]
    assert found.right == pytest.approx(float(same.double().mean()), abs=0.01)
    assert found.looked_at == 24


def test_grid_shows_the_images_framed_by_class():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([[0, 0, 1, 0], [2, 1, 2, -1]])
    panel, mosaic = drawn(
        pictures.neighbour_grid, pictures.Neighbours(images, labels, 0.5, 8), CLASSES
    )
    assert np.array_equal(panel.images[0].get_array(), mosaic)
    frames = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    expected = [[None, True, False, True], [None, False, True, False]]
    colours = {None: "#000000", True: pictures.GOOD, False: pictures.WRONG}
    for k, frame in enumerate(frames):
        i, j = divmod(k, 4)
        assert matplotlib.colors.to_hex(frame.get_edgecolor()) == colours[expected[i][j]]
        x, y = (round(v + 2.5) for v in frame.get_xy())
        part = mosaic[y : y + 64, x : x + 64]
        assert np.array_equal(part[::2, ::2].transpose(2, 0, 1), images[i, j].numpy())
    assert len(frames) == 8
    assert "50%" in panel.get_xlabel()


def test_evenly_spaced_images_of_a_large_split():
    split = TensorSplit(torch.zeros(25, 3, 8, 8, dtype=torch.uint8), torch.arange(25))
    assert report.evenly(split, 10).labels.tolist() == list(range(0, 25, 3))
    assert report.evenly(split, 25).labels.tolist() == list(range(25))


# ---- the command line ----------------------------------------------------------------------------


def test_command_draws_what_the_trainer_drew(run, tmp_path, capsys):
    copy = tmp_path / "whole"
    shutil.copytree(run, copy)
    for name in ("report.png", "report.html"):
        (copy / name).unlink()
    began = time.monotonic()
    assert report.main([str(copy)]) == 0
    assert time.monotonic() - began < 30  # a second or two, but the machine may be busy
    assert capsys.readouterr().out.splitlines() == [
        str(copy / "report.png"),
        str(copy / "report.html"),
    ]
    for name in ("report.png", "report.html"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("lost", ["checkpoint", "data"])
def test_without_checkpoint_or_data_it_draws_the_curves(lost, run, tmp_path, capsys):
    copy = tmp_path / "whole"
    shutil.copytree(run, copy)
    extra = []
    if lost == "checkpoint":
        (copy / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:5000])
    else:
        extra = ["--data-dir", str(tmp_path / "nowhere")]
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # cut short by a kill
    assert report.main([str(copy), *extra]) == 0
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert list(images_of(Page(text))) == ["curves"]
    assert "No map and no neighbours" in text
    assert ("is not a checkpoint" if lost == "checkpoint" else "nowhere") in text


def test_wrong_folders_get_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert report.main([str(folder)]) == 2
        line = capsys.readouterr().err.strip()
        assert "is not a run folder" in line and "\n" not in line


def test_a_run_without_matplotlib_says_so_in_one_line(images, tmp_path, monkeypatch, capsys):
    find, real = importlib.util.find_spec, builtins.__import__

    def no_import(name, *rest):
        if name.split(".")[0] == "matplotlib" or name == "torch.utils.tensorboard":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: None if n == "matplotlib" else find(n, *r)
    )
    monkeypatch.setattr(builtins, "__import__", no_import)
    folder = tmp_path / "run"
    assert train.main(flags(images, folder, "--epochs 1")) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "no report: the report needs matplotlib: pip install 'fastcl[train]'"
    assert lines[-2] == str(folder / "checkpoint.pt")
    assert not list(folder.glob("report*")) and not list(folder.glob("events*"))
    assert report.main([str(folder)]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


# ---- TensorBoard ---------------------------------------------------------------------------------


def scalars(folder):
    """{(key, step): value} of the events; every point must be there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = [
        (key, e.step, e.value) for key in events.Tags()["scalars"] for e in events.Scalars(key)
    ]
    assert len({(key, step) for key, step, _ in points}) == len(points)
    return {(key, step): value for key, step, value in points}


def expected(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return {
        (key, row["step"]): pytest.approx(value, rel=1e-6)
        for row in rows
        for key, value in row.items()
        if key not in ("step", "epoch") and value is not None
    }


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_events_are_the_numbers_of_metrics(run):
    assert scalars(run) == expected(run)


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_resume_continues_the_events(images, tmp_path, monkeypatch, run):
    step = train.Trainer._step
    folder = tmp_path / "cut"

    def killed(self, *batch):  # after the row of step 10, with step 8 saved
        step(self, *batch)
        if self.step == 11:
            raise train.Stopped("stopped without a checkpoint, as by a kill")

    with monkeypatch.context() as context:
        context.setattr(train.Trainer, "_step", killed)
        assert train.main(flags(images, folder)) == 1
    assert scalars(folder)["loss", 10]
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 8
    assert train.main(["--resume", str(folder)]) == 0
    found = scalars(folder)
    assert found == expected(folder)
    for row in read_rows(run / "metrics.jsonl"):
        if "loss" in row:
            assert found["loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)


def test_no_tensorboard_and_no_report_leave_nothing(images, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(flags(images, folder, "--epochs 1 --no-report --no-tensorboard")) == 0
    assert "report" not in capsys.readouterr().out
    assert not list(folder.glob("report*")) and not list(folder.glob("events*"))


# ---- a browser -----------------------------------------------------------------------------------


def near(pixels, colour):
    """How many pixels have about that colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((abs(pixels.astype(int) - wanted).max(-1) < 24).sum())


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_the_page(width, run, tmp_path):
    command = [BROWSER, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},4000", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run(
        [*command, (run / "report.html").as_uri()], capture_output=True, timeout=60, check=True
    )
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape == (4000, width, 3)
    for colour in (pictures.OURS, pictures.GOOD, pictures.WRONG):  # curves, frames of both kinds
        assert near(pixels, colour) > (100 if width > 1000 else 20)
    assert (pixels[:, -8:] == 255).all()  # nothing runs over the edge
