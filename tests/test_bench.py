"""`python -m bench`: what it counts, what it refuses to time, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not part of the installed package

import fastcl.functional as F
from bench import machine, measure, memory, report, scaling
from bench.__main__ import main
from bench.calls import Settings, make_inputs, step_of
from bench.inputs import New, resnet_shapes
from bench.measure import Runner
from bench.workloads import PROVIDERS, WORKLOADS, bytes_of, providers_of
from fastcl.ops import OPS

ONE = Settings(threads=1, repeats=3, seconds=0.05, memory=False)
TINY = {"N": 16, "D": 8}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str) -> dict[str, int]:
    """The small sizes, rows cut further: pytorch-metric-learning is cubic in them."""
    return {
        key: min(value, 32) if key == "N" else value for key, value in WORKLOADS[name].small.items()
    }


# ---- correctness comes first ---------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_installed_provider_agrees_with_the_float64_formula(name: str) -> None:
    workload, sizes = WORKLOADS[name], tiny(name)
    inputs = make_inputs(workload, sizes, ONE)
    for provider in providers_of(workload):
        result = measure.begin(workload, sizes, provider, ONE)
        if provider == "compile" or result.get("status") == "not installed":
            continue
        (runner,) = measure.checked(workload, sizes, result, inputs, ONE) or [None]
        assert result["status"] == "ok", (provider, result)
        assert runner.result is result
        assert result["errors"].keys() >= {*workload.gradients, *workload.mutates}


def test_every_operation_has_regressions_that_pass() -> None:
    root = Path(__file__).parent.parent
    files = {path.stem.removeprefix("bench_") for path in (root / "bench").glob("bench_*.py")}
    assert files == OPS.keys()
    pytest.importorskip("pytest_benchmark")
    flags = ["-k", "small", "--benchmark-disable", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *flags], cwd=root, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    counted = [w for w in WORKLOADS.values() if w.op]
    tests = sum(2 + ("builtin" in workload.peers) for workload in counted)
    assert f"{tests} passed" in answer.stdout, answer.stdout[-2000:]


class Called(TorchDispatchMode):
    """Collects which of fastcl's operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_every_operation_has_a_workload_that_runs_it() -> None:
    assert {w.op for w in WORKLOADS.values()} - {""} == OPS.keys()
    for workload in WORKLOADS.values():
        inputs = make_inputs(workload, workload.small, ONE)
        with Called() as called:
            step_of(workload, "fastcl", workload.small, inputs)()
        of_the_word = {op.overload.name() for op in OPS[workload.op]} if workload.op else set()
        ours = {name for name in called.names if name.startswith("fastcl::")}
        assert bool(ours & of_the_word) == bool(workload.op), (workload.name, ours)


@pytest.mark.parametrize(
    "fused",
    [
        lambda z0, z1: F.nt_xent(z0, z1, temperature=0.6),
        lambda z0, z1: F.nt_xent(z0, z1, temperature=0.5) + (z1 - z1.detach()).sum(),
        lambda z0, z1: F.nt_xent(z0, z1, temperature=0.5) * math.nan,
    ],
    ids=["value", "gradient", "nan"],
)
def test_a_wrong_provider_gets_no_number(fused, capsys) -> None:
    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=fused)
    wrong, right = measure.measure(workload, TINY, ["fastcl", "torch"], ONE)
    assert wrong["status"] == "wrong"
    assert "seconds" not in wrong
    assert right["status"] == "ok"
    assert right["seconds"]["median"] > 0
    report.print_table([wrong, right])
    line = next(line for line in capsys.readouterr().out.splitlines() if "fastcl" in line)
    assert "wrong" in line
    assert " ms" not in line and " µs" not in line


def test_an_exception_is_a_row_and_stops_nobody_else() -> None:
    def fails(z0, z1):
        raise RuntimeError("no such luck\nand more")

    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=fails)
    failed, right = measure.measure(workload, TINY, ["fastcl", "torch"], ONE)
    assert (failed["status"], failed["note"]) == ("failed", "RuntimeError: no such luck")
    assert "seconds" in right


def test_a_call_that_fails_later_is_a_row_too(monkeypatch, capsys) -> None:
    calls = []

    def fails_the_third_time(z0, z1):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of something")
        return F.nt_xent(z0, z1, temperature=0.5)

    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=fails_the_third_time)
    failed, right = measure.measure(workload, TINY, ["fastcl", "torch"], ONE)
    assert (failed["status"], failed["note"]) == ("failed", "RuntimeError: out of something")
    assert "seconds" not in failed
    assert len(right["seconds"]["samples"]) == 3
    report.print_table([failed, right])
    assert "failed: RuntimeError: out of something" in capsys.readouterr().out


def test_memory_that_cannot_be_measured_is_said(monkeypatch, capsys) -> None:
    def fails(**sizes):
        raise MemoryError("too much")

    peak = memory.peak_or_reason(fails)
    assert peak == (None, "memory: MemoryError: too much")
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: peak)
    settings = dataclasses.replace(ONE, memory=True)
    results = measure.measure(WORKLOADS["nt_xent"], TINY, ["torch"], settings)
    report.print_table(results)
    assert "memory: MemoryError: too much" in capsys.readouterr().out


def die(*_) -> None:
    os._exit(9)


def test_a_killed_memory_process_stops_nobody(monkeypatch) -> None:
    monkeypatch.setattr(memory, "send_peak", die)
    workload, settings = WORKLOADS["nt_xent"], dataclasses.replace(ONE, memory=True)
    peak = memory.peak_bytes(workload, TINY, "fastcl", settings)
    assert peak == (None, "killed while its memory was measured")


def test_a_memory_process_that_raises_says_why() -> None:
    sizes = {"N": 2**40, "D": 2}  # 8 TiB
    settings = dataclasses.replace(ONE, memory=True)
    peak, reason = memory.peak_bytes(WORKLOADS["nt_xent"], sizes, "fastcl", settings)
    assert peak is None
    assert reason.startswith("memory: RuntimeError: ")


def test_a_change_in_place_is_compared_too() -> None:
    workload = dataclasses.replace(
        WORKLOADS["ema"],
        fused=lambda targets, sources: F.ema_update_(targets, sources, momentum=0.9),
    )
    (result,) = measure.measure(workload, {"width": 2}, ["fastcl"], ONE)
    assert result["status"] == "wrong"


# ---- what is not run is still listed -------------------------------------------------------------


def test_a_missing_peer_is_listed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "version", lambda p: None if p == "lightly" else "1")
    results = measure.measure(WORKLOADS["nt_xent"], TINY, ["torch", "lightly"], ONE)
    assert results[1]["status"] == "not installed"
    report.print_table(results)
    assert "not installed" in capsys.readouterr().out


def test_what_cannot_fit_is_not_started(monkeypatch) -> None:
    monkeypatch.setattr(machine, "version", lambda p: "1")
    workload = WORKLOADS["nt_xent"]
    result = measure.begin(workload, workload.full, "pytorch-metric-learning", ONE)
    assert result["status"] == "does not fit"
    assert result["note"] == f"asks for about {13 * 8192**3 / 2**30:.0f} GiB"
    assert bytes_of(workload, "fastcl", workload.full, 4) == 0


# ---- sizes that grow -----------------------------------------------------------------------------


def at(rows: int, seconds: float, peak: float | None = None, provider: str = "fastcl") -> dict:
    """A result of nt_xent."""
    return {
        "workload": "nt_xent", "provider": provider, "sizes": {"N": rows, "D": 128},
        "dtype": "float32", "device": "cpu", "status": "ok",
        "seconds": {"median": seconds, "samples": [seconds]},
        **({} if peak is None else {"peak_bytes": peak}),
    }  # fmt: skip


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


# ---- a CUDA device, as far as it goes without one ------------------------------------------------


def test_on_a_gpu_triton_times_the_call(monkeypatch) -> None:
    testing = pytest.importorskip("triton.testing")
    calls: list[str] = []

    def do_bench(step, *, warmup, rep, return_mode):  # milliseconds
        step()
        assert return_mode == "median" and warmup > 0 and rep > 0
        return 2.5

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert machine.seconds(lambda: calls.append("a"), 7, "cuda:0") == 2.5e-3
    assert calls == ["a"]
    assert machine.best_rate(lambda: None, 5e9, "cuda") == 5e9 / 2.5e-3
    runner = Runner({"provider": "fastcl"}, dict, slow=False)
    settings = dataclasses.replace(ONE, device="cuda", seconds=1)
    assert measure.take_turns([runner], settings) == [[2.5e-3] * 3]


GPU_PEERS = [(w.name, p) for w in WORKLOADS.values() for p in w.peers if w.peers[p].device]


def test_gpu_peers_are_no_rows_of_a_cpu() -> None:
    assert {peer for _, peer in GPU_PEERS} == {"memeff", "inf-cl", "siglip-kernel", "liger-kernel"}
    for name, peer in GPU_PEERS:
        assert peer not in providers_of(WORKLOADS[name], "cpu")
        assert peer in providers_of(WORKLOADS[name], "cuda:1")


@pytest.mark.parametrize(("name", "peer"), GPU_PEERS)
def test_gpu_peers_are_called_by_their_documentation(name: str, peer: str, monkeypatch) -> None:
    """Their documented functions in plain PyTorch stand in for them: what we pass must be right."""

    def pair(x):
        return torch.arange(len(x))

    class CLIP:  # memeff: normalises; stable=True would rescale the gradients
        def __init__(self, temperature, normalized_inputs=False, stable=True):
            assert not stable and not normalized_inputs
            self.temperature = temperature

        def __call__(self, x, y):
            s = normalize(x, dim=1) @ normalize(y, dim=1).T / self.temperature
            return (cross_entropy(s, pair(s)) + cross_entropy(s.T, pair(s))) / 2

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):  # a loss for each row
        assert q.shape[1] % head_dim == 0
        return cross_entropy(scale * q @ k.T, pair(q), reduction="none")

    def fused_siglip_loss(img, txt, log_temperature, bias):  # normalised features
        s = log_temperature.exp() * img @ txt.T + bias
        return -logsigmoid((2 * torch.eye(len(s)) - 1) * s).sum() / len(s)

    class Linear:  # liger: cross entropy of input @ weight.T
        def __call__(self, lin_weight, _input, target):
            return cross_entropy(_input @ lin_weight.T, target)

    fakes = {
        "memeff": {"MemoryEfficientCLIPLoss": CLIP},
        "inf_cl": {"cal_flash_loss": cal_flash_loss},
        "siglip_kernel": {"fused_siglip_loss": fused_siglip_loss},
        "liger_kernel": {},
        "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": Linear},
    }
    for module, names in fakes.items():
        fake = types.ModuleType(module)
        fake.__dict__.update(names)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(machine, "version", lambda p: "1")
    workload, sizes = WORKLOADS[name], tiny(name)
    result = measure.begin(workload, sizes, peer, ONE)
    assert measure.checked(workload, sizes, result, make_inputs(workload, sizes, ONE), ONE)
    assert result["errors"].keys() >= {"value", "image", "text"}


# ---- what is counted -----------------------------------------------------------------------------


def test_resnet_50_has_its_published_number_of_parameters() -> None:
    shapes = resnet_shapes(64)
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032


def test_fraction_is_work_over_time_over_the_best_rate() -> None:
    result = {"work": {"amount": 3e9, "unit": "flop"}, "seconds": {"median": 0.5}}
    measure.set_fractions([result], {"mm": 8e9, "registers": 12e9})
    assert result["fraction_of_limit"] == 0.5
    assert result["limit"]["measured_by"] == "registers"


def test_providers_take_turns_and_slow_ones_sit_out(monkeypatch) -> None:
    calls: list[str] = []

    def step(name: str, seconds: float):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return {}

        return Runner({"provider": name}, run, slow=False)

    settings = dataclasses.replace(ONE, repeats=5, seconds=0.08)
    samples = measure.take_turns([step("a", 0.006), step("b", 0.05)], settings)
    assert calls == ["a", "b", *"ab", *"ba", *"ab", *"aa"]
    assert [len(s) for s in samples] == [5, 3]
    assert min(samples[0]) >= 0.006


def test_a_call_that_takes_all_the_seconds_is_made_once() -> None:
    calls: list[str] = []

    def step(name: str, slow: bool) -> Runner:
        return Runner({"provider": name}, lambda: calls.append(name) or time.sleep(0.02), slow)

    settings = dataclasses.replace(ONE, repeats=5, seconds=0.01)
    samples = measure.take_turns([step("known", True), step("found", False)], settings)
    assert calls == ["found", "known", "found"]  # the second to find out
    assert [len(s) for s in samples] == [1, 1]


def test_memory_is_the_peak_of_one_call_in_a_process_of_its_own() -> None:
    settings = dataclasses.replace(ONE, memory=True)
    sizes = {"N": 1024, "D": 16}
    plain, reason = memory.peak_bytes(WORKLOADS["nt_xent"], sizes, "torch", settings)
    assert reason == ""
    if plain is None:
        pytest.skip("the kernel does not offer /proc/self/clear_refs")
    matrix = 4 * 2048**2
    assert 3 * matrix <= plain <= 8 * matrix


def test_registers_bound_the_multiply_adds() -> None:
    if machine.register_library() is None:
        pytest.skip("no C++ compiler")
    rates = machine.multiply_add_rates(torch.float32, "cpu")
    assert rates["registers"] > 1e9
    assert rates["registers"] > 0.5 * rates["mm"]  # other processes may slow either


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["nt_xnt"], ["clip", "--providers", "torch,lightli"]])
def test_a_typo_gives_one_line_with_the_list(arguments, capsys) -> None:
    assert main(arguments) == 2
    line = one_line(capsys)
    assert ", ".join(WORKLOADS if "nt_xnt" in arguments else PROVIDERS) in line
    assert f"did you mean {'nt_xent' if 'nt_xnt' in arguments else 'lightly'}?" in line


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("python -m bench: ")
    return line


def test_what_cannot_be_done_is_one_line_and_status_2(tmp_path, capsys) -> None:
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text('{"results": [')
    result = {"workload": "nt_xent", "provider": "a peer of the future"}
    other.write_text(json.dumps({"results": [result]}))
    cases = {
        ("--from", str(tmp_path / "none.json")): "No such file",
        ("--from", str(broken)): "is no file that --json has written",
        ("--from", str(other)): "another version",
        ("clip", "--providers", "lightly"): "nothing to measure",
        ("clip", "--providers", "memeff"): "nothing to measure",
        ("clip", "--device", "cuda:7"): "no CUDA device",
        ("clip", "--device", "tpu"): "cpu, cuda",
        ("clip", "--seconds", "0"): "above 0",
        ("clip", "--scaling", "--least", "64", "--most", "32"): "--most 32",
        ("clip", "--json", str(tmp_path)): "Is a directory",
        ("clip", "--json", str(broken / "x.json")): "cannot write to",
        ("clip", "--plots", str(broken)): "File exists",
    }
    if torch.cuda.is_available():
        del cases["clip", "--providers", "memeff"], cases["clip", "--device", "cuda:7"]
    for arguments, expected in cases.items():
        assert main(list(arguments)) == 2, arguments
        assert expected in one_line(capsys), arguments


def test_help_describes_every_subcommand(capsys) -> None:
    from bench.__main__ import SUBCOMMANDS

    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{name:<12}{what}" in shown for name, (_, what) in SUBCOMMANDS.items())


def test_ctrl_c_keeps_what_was_measured(tmp_path) -> None:
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "bench", "queue_push", "nt_xent", "--providers", "fastcl"]
    command += ["--no-memory", "--threads", "1", "--json", str(file)]
    process = subprocess.Popen(
        [*command, "--seconds", "1"], cwd=Path(__file__).parent.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.stat().st_size):  # queue_push is done
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped" in err
    assert "queue_push" in out and "spread: " in out
    assert [r["workload"] for r in json.loads(file.read_text())["results"]] == ["queue_push"]


def test_list_names_every_workload(capsys) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in WORKLOADS)


def test_a_run_writes_what_is_needed_to_repeat_it(tmp_path, capsys) -> None:
    file = tmp_path / "new" / "run.json"
    flags = ["--providers", "fastcl,torch", "--threads", "1", "--repeats", "3", "--no-memory"]
    arguments = ["sinkhorn", "negative_cosine", "--size", "small", *flags, "--json", str(file)]
    assert main([*arguments, "--seconds", "0.05"]) == 0
    printed = capsys.readouterr().out
    run = json.loads(file.read_text())
    assert run["command"].startswith("python -m bench sinkhorn negative_cosine --size small")
    assert run["machine"]["threads"] == 1
    assert torch.__version__.startswith(run["machine"]["versions"]["torch"])
    names = [(r["workload"], r["provider"]) for r in run["results"]]
    assert names == [(w, p) for w in ("sinkhorn", "negative_cosine") for p in ("fastcl", "torch")]
    for r in run["results"]:
        work, seconds = r["work"]["amount"], r["seconds"]["median"]
        assert len(r["seconds"]["samples"]) == 3
        assert r["fraction_of_limit"] == pytest.approx(work / seconds / r["limit"]["per_second"])
        assert report.duration(seconds) in printed


def test_exit_status_tells_that_fastcl_is_wrong(monkeypatch, capsys) -> None:
    wrong = dataclasses.replace(
        WORKLOADS["dcl"], fused=lambda z0, z1: F.dcl(z0, z1, temperature=1.0)
    )
    monkeypatch.setitem(WORKLOADS, "dcl", wrong)
    flags = ["--size", "small", "--providers", "fastcl", "--threads", "1", "--no-memory"]
    assert main(["dcl", *flags]) == 1


def test_plain_table_holds_what_the_rich_one_does() -> None:
    results = measure.measure(WORKLOADS["clip"], TINY, ["fastcl", "torch"], ONE)
    measure.set_fractions(results, {"mm": 1e12})
    text = report.plain_table(report.title(results[0]), report.rows(results))
    heading, columns, *lines = text.splitlines()
    assert heading.startswith("clip  N=16 D=8  float32  cpu  ")
    assert [line.split()[0] for line in lines] == ["fastcl", "torch"]
    assert columns.index("error") > columns.index("memory") > columns.index("median")


def test_pictures_show_the_measured_numbers(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    results = []
    for rows in (8, 16, 32):
        results += measure.measure(
            WORKLOADS["nt_xent"], {"N": rows, "D": 8}, ["fastcl", "torch"], ONE
        )
    measure.set_fractions(results, {"mm": 1e12})
    for r in results:
        r["peak_bytes"] = 2**20 * r["sizes"]["N"]
    assert [p.name for p in plots.draw(results, tmp_path)] == [
        "scaling_nt_xent.png",
        "fraction_of_limit.png",
    ]
    figure = plots.scaling(results, "N")
    seconds, memory = (axes.lines[0] for axes in figure.axes)
    own = [r for r in results if r["provider"] == "fastcl"]
    assert list(seconds.get_xdata()) == list(memory.get_xdata()) == [8, 16, 32]
    assert list(seconds.get_ydata()) == [1e3 * r["seconds"]["median"] for r in own]
    assert list(memory.get_ydata()) == [8, 16, 32]


def test_pictures_end_lines_where_a_size_was_skipped() -> None:
    plots = pytest.importorskip("bench.plots")
    fast = [at(n, 1e-9 * n**2, 100.0 * n) for n in (2**14, 2**15, 2**16)]
    slow = [at(n, 1e-8 * n**2, n**2, "torch") for n in (2**14, 2**15)]
    for r in fast + slow:
        r["seconds"].update(lower_quartile=r["seconds"]["median"], upper_quartile=1.0)
    skipped = {**at(2**16, 0.0, provider="torch"), "status": "does not fit"}
    del skipped["seconds"]
    figure = plots.scaling([*fast, *slow, skipped], "N")
    for axes in figure.axes:
        assert [list(line.get_xdata()) for line in axes.lines] == [
            [2**14, 2**15, 2**16],
            [2**14, 2**15],
        ]
        assert min(min(line.get_ydata()) for line in axes.lines) > 0
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "fastcl: time $N^{2.00}$, memory $N^{1.00}$",
        "torch: time $N^{2.00}$, memory $N^{2.00}$; above 32,768 does not fit",
    ]


def test_inputs_are_the_same_for_everybody() -> None:
    for workload in WORKLOADS.values():
        first, second = (workload.inputs(New(torch.float32, "cpu"), **workload.small) for _ in "ab")
        for x, y in zip(first.values(), second.values()):
            assert all(map(torch.equal, x, y)) if isinstance(x, list) else torch.equal(x, y)
