"""`python -m bench --scaling`: sizes that grow."""

from __future__ import annotations

import dataclasses
import json

import pytest
from bench_setting import ONE, at, one_thread  # noqa: F401

from bench import machine, measure, report, scaling
from bench.__main__ import main
from bench.workloads import WORKLOADS


def test_exponents_are_slopes_in_the_logarithm() -> None:
    powers = [at(n, 3e-9 * n**2, 400.0 * n**1.25) for n in (4096, 8192, 16384)]
    (fit,) = scaling.fits(powers)
    assert (fit["from"], fit["to"], fit["provider"]) == (4096, 16384, "fastcl")
    assert fit["work"] == pytest.approx(2)
    assert [fit["seconds"], fit["seconds_last"]] == pytest.approx([2, 2])
    assert [fit["bytes"], fit["bytes_last"]] == pytest.approx([1.25, 1.25])
    # Least squares, not the ends: log2 of 1, 4, 4 against 0, 1, 2 has slope 1.
    assert scaling.exponent([(1, 1), (2, 4), (4, 4)]) == pytest.approx(1)
    assert scaling.fits(powers[:1]) == []
    tiny = [at(n, 1e-3, 4096.0) for n in (16, 32)]  # a page is no measurement
    assert scaling.fits(tiny)[0]["bytes"] is None


def test_the_next_size_is_guessed_from_the_last_ones() -> None:
    workload, next_one = WORKLOADS["nt_xent"], at(8192, 0.0)
    guess = scaling.expected(workload, next_one, [at(2048, 1.0, 2**21), at(4096, 4.0, 2**22)])
    assert guess == {"seconds": pytest.approx(16), "bytes": pytest.approx(2**23)}
    plain = [at(2048, 1.0, 2**21, "torch"), at(4096, 7.0, 2**22, "torch")]
    guess = scaling.expected(workload, at(8192, 0.0, provider="torch"), plain)
    assert guess == {"seconds": pytest.approx(49), "bytes": pytest.approx(2**24)}  # a matrix
    noise = [at(2048, 1.0), at(4096, 100.0)]
    assert scaling.expected(workload, next_one, noise)["seconds"] == pytest.approx(800)  # N³
    assert scaling.expected(workload, next_one, plain) == {"seconds": None, "bytes": None}


def test_what_would_take_too_long_or_not_fit_is_listed_and_not_called(monkeypatch, capsys) -> None:
    def never(z0, z1):
        raise AssertionError("called")

    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=never, plain=never)
    sizes = {"N": 32, "D": 128}
    huge = float(machine.available_bytes())
    earlier = [at(16, 100.0), at(16, 1e-3, huge, "torch")]
    settings = dataclasses.replace(ONE, longest=300.0)
    results = measure.measure(workload, sizes, ["fastcl", "torch"], settings, earlier)
    assert [r["status"] for r in results] == ["too slow", "does not fit"]
    report.print_table(results)
    out = capsys.readouterr().out
    assert "too slow: a call takes about 400 s" in out
    assert f"does not fit: asks for about {4 * huge / 2**30:.0f} GiB" in out


def test_a_slow_size_is_checked_at_the_small_one(capsys) -> None:
    workload, sizes = WORKLOADS["nt_xent"], {"N": 512, "D": 128}
    earlier = [at(256, 2.0)]  # so 8 s are expected, more than the 0.05 of all samples
    (result,) = measure.measure(workload, sizes, ["fastcl"], ONE, earlier)
    assert result["status"] == "ok"
    assert result["checked_at"] == workload.small
    assert len(result["seconds"]["samples"]) == 1
    report.print_table([result])
    assert "one sample; checked at N=128 D=64" in capsys.readouterr().out


def test_scaling_prints_and_keeps_the_exponents(tmp_path, capsys) -> None:
    file = tmp_path / "run.json"
    sizes = ["--scaling", "--least", "64", "--most", "256", "--no-memory", "--threads", "1"]
    flags = ["--providers", "fastcl", "--repeats", "3", "--seconds", "0.05", "--json", str(file)]
    assert main(["negative_cosine", *sizes, *flags]) == 0
    run = json.loads(file.read_text())
    assert [r["sizes"]["N"] for r in run["results"]] == [64, 128, 256]
    (fit,) = run["fits"]
    points = [(r["sizes"]["N"], r["seconds"]["median"]) for r in run["results"]]
    assert fit["seconds"] == pytest.approx(scaling.exponent(points))
    printed = capsys.readouterr().out
    assert "negative_cosine: growth with N" in printed and "64 to 256" in printed
    assert f"{fit['seconds']:.2f}" in printed
