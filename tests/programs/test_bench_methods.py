"""`python -m bench methods`: what a row holds, what a failure does, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is not in the installed package

from bench import methods
from bench.__main__ import main
from fastcl.methods import METHODS

ROOT = Path(__file__).parents[2]

# --negative-weight is a flag of InvaSpread only: with it SimCLR fails, at once and with one line.
FLAGS = "-- --backbone tiny-resnet --batch-size 16 --log-every 2 --workers 0 --negative-weight 1"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two classes: noise that is bright above, noise that is bright below."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (16, 16, 3))
                pixels[8 * label : 8 * label + 8] += 127
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arguments(images: Path, output: Path, epochs: int) -> list[str]:
    given = f"methods simclr-v1 invaspread --data folder --data-dir {images} --output {output}"
    return [*given.split(), *FLAGS.split(), "--epochs", str(epochs)]


def test_rows_hold_what_each_training_wrote(images, tmp_path, capsys) -> None:
    assert main(arguments(images, tmp_path / "out", 1)) == 1  # one of them failed
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "methods.json").read_text())
    failed, row = record["rows"]
    assert (failed["method"], failed["status"]) == ("simclr-v1", "failed")
    assert "unknown flag '--negative-weight'" in failed["note"]
    assert "trained" not in failed

    folder = tmp_path / "out" / "invaspread"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = metrics[0], metrics[-2]  # kNN before; loss, kNN after
    assert row["status"] == "ok"
    assert row["untrained"] == first["knn_top1"]
    assert row["raw_pixels"] == first.get("knn_top1_raw_pixels", row["raw_pixels"])
    assert row["trained"] == pytest.approx(metrics[-1]["knn_top1"], abs=1e-4)
    for name in ("loss", "feature_std", "effective_rank"):
        assert row[name] == last[name]
    assert 0 <= row["linear"] <= 1
    assert row["protocol"] == "moco"  # InvaSpread's paper has no linear probe
    assert row["seconds"] > 0.5
    assert 2**27 < row["peak_bytes"] < 2**34  # torch alone is more than the first

    table = (tmp_path / "out" / "methods.md").read_text()
    for text in (printed, table):
        assert "simclr-v1" in text and "failed" in text and "unknown flag" in text
        assert f"{row['trained']:.1%}" in text and f"{row['loss']:.3f}" in text
    assert table.startswith("```\npython -m bench methods simclr-v1 invaspread")
    assert (tmp_path / "out" / "methods.png").stat().st_size > 10_000

    # What is done is not run again; what failed is.
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    assert main(arguments(images, tmp_path / "out", 1)) == 1
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "out" / "methods.json").read_text())["rows"]
    assert again[1] == row
    assert "simclr-v1: training" in capsys.readouterr().out


def test_another_command_is_another_row(tmp_path) -> None:
    (tmp_path / methods.NAME).touch()
    row = {"arguments": ["--method", "swav"], "minutes": None, "status": "ok"}
    (tmp_path / methods.ROW).write_text(json.dumps(row))
    assert methods.earlier(tmp_path, ["--method", "swav"], None) == row
    assert methods.earlier(tmp_path, ["--method", "swav", "--epochs", "1"], None) is None
    assert methods.earlier(tmp_path, ["--method", "swav"], 5.0) is None
    (tmp_path / methods.ROW).write_text("{")
    assert methods.earlier(tmp_path, ["--method", "swav"], None) is None


def test_foreign_folders_are_left_alone(tmp_path) -> None:
    (tmp_path / "keep.txt").touch()
    row = methods.train(tmp_path, "swav", [], None)
    assert row["status"] == "failed" and "not of this bench" in row["note"]
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_ctrl_c_stops_the_training_and_prints_the_table_so_far(images, tmp_path) -> None:
    command = [sys.executable, "-m", "bench", *arguments(images, tmp_path / "out", 100_000)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "out" / "invaspread" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size > 500):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped" in err
    rows = json.loads((tmp_path / "out" / "methods.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["simclr-v1"]
    assert "raw pixels" in out  # the table
    log = (tmp_path / "out" / "invaspread" / methods.LOG).read_text()
    assert "stopped at step" in log and "Traceback" not in log  # it saved itself
    size = metrics.stat().st_size
    time.sleep(0.3)
    assert metrics.stat().st_size == size  # and nobody trains on


# ---- processes -----------------------------------------------------------------------------------


def test_peak_memory_and_status_are_those_of_the_process(tmp_path) -> None:
    big = "x = bytearray(300 << 20); del x; time.sleep(0.3)"  # less than this process has
    script = f"import sys, time; {big}; print('said'); sys.exit(3)"
    status, seconds, peak = methods.run_process(["-c", script], tmp_path / "log", None)
    assert status == 3
    assert peak is None or 300 << 20 < peak < 340 << 20
    assert sys.platform != "linux" or peak is not None
    assert 0 < seconds < 30
    assert methods.last_line(tmp_path / "log") == "said"


@pytest.mark.parametrize("polite", [True, False], ids=["saves itself", "does not end"])
def test_a_training_is_stopped_at_its_limit(polite: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(methods, "PATIENCE", 0.5)
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')\n"
    if polite:
        script += "raise SystemExit(130)"
    else:
        script += "time.sleep(60)"
    status, seconds, _ = methods.run_process(["-uc", script], tmp_path / "log", 1.0)
    assert status is None
    assert 1.0 <= seconds < 20
    assert methods.last_line(tmp_path / "log") == "saved"


def test_a_training_that_ends_at_its_limit_is_done(tmp_path) -> None:
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: pass"
    status, _, _ = methods.run_process(["-c", script], tmp_path / "log", 1.0)
    assert status == 0


# ---- reading -------------------------------------------------------------------------------------


def test_metrics_cut_short_are_read(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "epoch": 0, "knn_top1_raw_pixels": 0.3, "knn_top1": 0.2},
        *(
            {"step": s, "epoch": s / 4, "loss": 5.0 - s, "feature_std": 0.1 * s,
             "effective_rank": 10.0 * s, "images_per_second": 100.0 * s}
            for s in (1, 2, 3)
        ),
        {"step": 3, "epoch": 1, "knn_top1": 0.5},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert methods.read_metrics(path) == {
        "raw_pixels": 0.3, "untrained": 0.2, "trained": 0.5, "images_per_second": 200.0,
        "epoch": 0.75, "loss": 2.0, "feature_std": pytest.approx(0.3), "effective_rank": 30.0,
    }  # fmt: skip
    path.write_text(json.dumps(rows[0]) + "\n")  # stopped before the first step
    assert methods.read_metrics(path) == {"raw_pixels": 0.3, "untrained": 0.2}


def test_every_method_runs_by_every_quick_recipe() -> None:
    options = methods.parser().parse_args([])
    pairs = methods.check(options, [])
    assert [m for m, r in pairs if r == "quick"] == list(METHODS)
    assert methods.protocol_of("moco-v2") == "moco"
    assert methods.protocol_of("simclr-v1") == "simclr"
    assert methods.title("dino", "quick-vit") == "dino vit"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("swaw", "did you mean swav? Methods: "),
        ("--data fashoin", "did you mean fashion? Data: "),
        ("--data-dir /none", "is no folder"),
        ("--minutes 0", "above 0"),
        ("--output /dev/null/x", "cannot write to --output /dev/null/x"),
        ("--recipe quick-vti", "did you mean quick-vit? Recipes: quick, quick-vit"),
        ("swav -- --output x", "the bench sets it"),
        ("swav -- --data=folder", "the bench sets it"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(given: str, expected: str, capsys) -> None:
    assert main(["methods", *given.split()]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and expected in line
    assert line.startswith("python -m bench methods: ")


def test_one_recipe_of_each_method(tmp_path) -> None:
    def pairs(*given: str) -> list[tuple[str, str]]:
        return methods.check(methods.parser().parse_args([*given, "--output", str(tmp_path)]), [])

    assert set(pairs("moco-v3")) == {("moco-v3", "quick-vit"), ("moco-v3", "quick")}
    assert pairs("moco-v3", "--recipe", "quick") == [("moco-v3", "quick")]
    assert [method for method, _ in pairs("--recipe", "quick")] == list(METHODS)
    assert pairs("--recipe", "quick-vit") == [("moco-v3", "quick-vit"), ("dino", "quick-vit")]


def test_the_picture_shows_the_accuracies(tmp_path) -> None:
    plots = pytest.importorskip("bench.plots")
    row = {"method": "swav", "status": "ok", "untrained": 0.2, "trained": 0.5, "linear": 0.6}
    more = {"raw_pixels": 0.37, "seconds": 90.0, "peak_bytes": 2**30}
    failed = {"method": "byol", "status": "failed"}
    figure = plots.methods({"data": "fashion", "rows": [{**row, **more}, failed]})
    accuracy, seconds = figure.axes
    marks = {float(dot.get_offsets()[0][0]) for dot in accuracy.collections}
    assert sorted(marks) == pytest.approx([20.0, 50.0, 60.0])
    ends = {tuple(map(float, line.get_xdata())) for line in accuracy.lines}
    assert ends == {(20.0, 50.0), (37.0, 37.0)}
    assert [bar.get_width() for bar in seconds.patches] == [90.0]
    assert "failed" in [text.get_text() for text in accuracy.texts]
