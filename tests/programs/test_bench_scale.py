"""`python -m bench scale`: the model against two real processes, and what it says of many ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is not in the installed package

from bench import scale, scale_ranks
from bench.__main__ import main
from bench.scale_model import KINDS, LOSSES, Case, Machine, flops, peak_bytes, received, seconds


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A run of two real processes; that of one rank, for which they have no use, is made up."""
    folder = tmp_path_factory.mktemp("scale")
    two = scale_ranks.measure(2, list(LOSSES), 512, 128, 1)
    alone = {"seconds": 0.1, "received": 0, "allocated": 1 << 20, "peak": 1 << 20}
    one = {key: {} if key == "link" else alone for key in two}
    flags = "--ranks 1 2 --images 512 --features 128 --repeats 1 --far-ranks 1 64 512"
    arguments = f"scale {flags} --plots {folder} --json {folder / 'scale.json'}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_ranks, "measure", lambda world, *_: {1: one, 2: two}[world])
        assert main(arguments) == 0
    assert (folder / "scale.png").stat().st_size > 20_000
    return json.loads((folder / "scale.json").read_text())


def row_of(record, loss, kind, world):
    (row,) = (
        row for row in record["measured"]
        if (row["loss"], row["kind"], row["world"]) == (loss, kind, world)
    )  # fmt: skip
    return row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_receive_the_models_bytes(record, loss, kind):
    row = row_of(record, loss, kind, 2)
    own, rounds = 512 * 128 * LOSSES[loss], {"gather": 3, "ring": 4}[kind]
    assert row["received"] == row["model"]["received"]
    assert 0 <= row["received"] - rounds * 4 * own < 0.1 * own
    assert row_of(record, loss, kind, 1)["received"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_tensors_of_two_processes_are_the_models(record, loss, kind):
    row = row_of(record, loss, kind, 2)
    assert row["allocated"] == pytest.approx(row["model"]["peak"], rel=0.02)


def test_what_is_printed_is_what_was_measured(record, capsys):
    row = {
        **row_of(record, "clip", "ring", 2),
        "received": 130e3,
        "allocated": 1.5e6,
        "peak": 2.5e9,
    }
    scale.show_measured({**record, "measured": [row]})
    printed = next(line for line in capsys.readouterr().out.splitlines() if "ring" in line)
    found = [printed.index(size) for size in ("130 kB", "1.5 MB", "2.5 GB")]
    assert found == sorted(found)


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_two_processes_is_near_the_models(record, loss):
    gather, ring = (row_of(record, loss, kind, 2) for kind in KINDS)
    if not gather["peak"]:
        pytest.skip("this kernel does not tell peaks of memory")
    assert 0.8 < ring["peak"] / ring["model"]["peak"] < 1.5
    assert 0.8 < gather["peak"] / gather["model"]["peak"] < 1.8
    assert ring["allocated"] < gather["allocated"]  # to the byte, where pages come and go


def test_the_rate_is_that_of_one_rank(record):
    for loss in LOSSES:
        for kind in KINDS:
            row = row_of(record, loss, kind, 1)
            assert row["model"]["step"] == pytest.approx(row["seconds"])
    assert all(record["here"][name] > 0 for name in ("flops", "bandwidth", "latency"))


def test_memory_of_the_ring_does_not_grow_with_the_ranks_features(record):
    """Gather's grows with A = W·U; the ring's only by 8 bytes a row, for the rows' numbers."""
    for loss in LOSSES:
        near, far = (Case(loss, "ring", world, 1024, 256, backend="nccl") for world in (2, 512))
        assert peak_bytes(far) - peak_bytes(near) == 8 * 510 * near.rows
        near, far = (Case(loss, "gather", world, 1024, 256, backend="nccl") for world in (2, 512))
        assert peak_bytes(far) > 100 * peak_bytes(near)
    far = [row for row in record["far"] if row["world"] == 512]
    assert len(far) == 4 and far[0]["peak"] > 50 * far[1]["peak"]


def test_model_by_hand():
    """3 ranks of 2 images, 5 features, in bfloat16 over NCCL."""
    machine = Machine(flops=100.0, bandwidth=10.0, latency=0.5)
    clip = Case("clip", "gather", 3, 2, 5, itemsize=2, backend="nccl")
    assert flops(clip) == 4 * 2 * 2 * 6 * 5
    sizes, keys, gradients, columns = 2 * 8, 2 * 2 * 10 * 2, 2 * 10 * 4, 3 * 2 * 2 * 4
    assert received(clip) == sizes + keys + gradients + columns
    assert seconds(clip, machine)["communication"] == (2 + 4 + 2 + 6) * 0.5 + received(clip) / 10
    ring = Case("nt_xent", "ring", 3, 2, 5, itemsize=2, backend="nccl", passes=5)
    assert flops(ring) == 5 * 2 * 4 * 12 * 5
    assert received(ring) == 2 * 8 + 2 * 2 * 20 * 2 + 3 * 20 * 4
    assert seconds(ring, machine)["step"] == pytest.approx(
        flops(ring) / 100 + (2 + 4 + 3) * 0.5 + received(ring) / 10
    )


def test_model_alone_names_what_takes_less_time(capsys):
    given = "scale --no-measure --backend nccl --flops 3e14 --bandwidth 25e9 --latency 2e-5"
    assert main([*given.split(), "--far-ranks", "8", "--far-images", "128"]) == 0
    assert capsys.readouterr().out.count("gather, 1.") == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--losses clap", "unknown loss 'clap'"),
        ("--no-measure", "--no-measure needs --flops, --bandwidth and --latency"),
        ("--ranks 2 3", "--ranks must have 1"),
        ("--images 1", "--images must be at least 2; got 1"),
        ("--flops -1", "must be above 0"),
    ],
)
def test_wrong_usage_is_one_line(flags, message, capsys):
    assert main(["scale", *flags.split()]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told
