"""`make sanitize`: the compiled kernels under the address and undefined-behaviour sanitizers.

Builds csrc/ into build/sanitize and runs every operation, forward and backward, over odd sizes
(none at all where that is allowed), dtypes, ids and thread counts, in one process per instruction
set. Any report ends it with an error.
Names of instruction sets as arguments choose some; the default is all that this machine runs.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
SANITIZE = "-fsanitize=address,undefined"
# One report is enough; -O1 keeps the lines of the source recognisable.
FLAGS = f"{SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
ROWS = (0, 1, 2, 3, 17, 63, 129)
FEATURES = (1, 5, 100, 129)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def environment() -> dict[str, str]:
    """The sanitizers' runtimes have to be loaded before Python; memory starts as garbage."""
    names = [f"lib{name}.so" for name in ("asan", "ubsan")]
    asked = [[*compiler(), f"-print-file-name={name}"] for name in names]
    paths = [subprocess.run(a, capture_output=True, text=True).stdout.strip() for a in asked]
    if not all(os.path.isabs(path) for path in paths):
        raise SystemExit("fastcl: libasan and libubsan not found; use g++ as CXX")
    return os.environ | {
        "LD_PRELOAD": " ".join(paths),
        # Python frees nothing at its end. Fresh memory is NaN.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=100000000:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build() -> None:
    flags = {"CXXFLAGS": FLAGS, "LDFLAGS": SANITIZE, "FASTCL_REQUIRE_COMPILER": "1"}
    folders = ["--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "objects")]
    command = [sys.executable, "setup.py", "-q", "build", *folders]
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True)


def run_here() -> None:
    """Every operation of this process's instruction set."""
    import torch

    from fastcl import _C

    assert BUILD in Path(_C.kernels.__file__).parents, _C.kernels.__file__
    calls = 0
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for n, d in product(ROWS, FEATURES):
                torch.manual_seed(n * 1000 + d)
                for operation in operations(n, d, dtype):
                    operation()
                    calls += 1
    print(f"{_C.ISA}: {calls} calls, no report", flush=True)


def operations(n: int, d: int, dtype: object) -> list[Callable[[], None]]:
    import torch
    from torch import Tensor

    import fastcl.functional as F

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    def back(loss: Tensor | tuple[Tensor, ...]) -> None:
        losses = loss if isinstance(loss, tuple) else (loss,)
        total = sum(x.double().nan_to_num(0, 0, 0).sum() for x in losses)
        total.backward()

    def lse(m: int, normalize: bool, reduce: str, ids: bool) -> None:
        q, k = random(n, d), random(m, d)
        a = {"query_ids": torch.randint(5, (n,)), "key_ids": torch.randint(5, (m,))} if ids else {}
        t = torch.tensor(3.0, requires_grad=True)
        back(F.similarity_lse(q, k, scale=t, normalize=normalize, reduce=reduce, **a))

    def fixed_keys() -> None:
        back(F.similarity_lse(random(n, d), random(63, d).detach(), scale=3.0))

    def queue() -> None:
        rows = max(n, 1)
        for pushed in (0, 1, 3, n, 2 * n + 1):  # past the end, and more than fits
            queue, pointer = random(rows, d).detach(), torch.tensor([rows - 1])
            F.queue_push_(queue, pointer, random(pushed, d).detach())

    def bank() -> None:
        rows = max(n, 1)
        index = torch.randint(rows, (2 * n,))
        F.bank_update_(random(rows, d).detach(), index, random(2 * n, d).detach())

    def bank_scores() -> None:
        for k in (0, 1, 3, 17):
            index = torch.randint(63, (n, k))
            back(F.bank_scores(random(n, d), random(63, d).detach(), index, scale=2.0))
        if n > 8 and d > 128:  # ranges of several blocks
            index = torch.randint(18_001, (n, 40_000 // n))
            back(F.bank_scores(random(n, d), random(18_001, d).detach(), index))

    def distillation() -> None:
        student, teacher = random(3, n, d), random(2, n, d).detach()
        back(F.self_distillation(student, teacher, center=torch.zeros(d)))

    def ema() -> None:
        targets = [torch.randn(n, d), torch.randn(n * d)]
        F.ema_update_(targets, [random(n, d).detach(), random(n * d).detach()], momentum=0.9)

    def sinkhorn() -> None:
        F.sinkhorn(random(n, d).detach())

    def spread(z0: Tensor, z1: Tensor, **options: bool | float) -> None:
        for detach in (True, False):
            back(F.instance_spread(z0, z1, detach_columns=detach, **options))

    def others_are_closest() -> None:  # an entry above ½ that is not the partner
        z = random(n, d)
        spread(z, z.roll(1, 0), temperature=0.03)

    labels = torch.randint(5, (n,))
    allow_nothing = [
        *(
            lambda m=m, normalize=normalize, reduce=reduce, ids=ids: lse(m, normalize, reduce, ids)
            for m, normalize, reduce, ids in (
                (0, True, "both", False),
                (1, True, "rows", False),
                (3, False, "columns", True),
                (17, True, "both", True),
                (129, False, "both", False),
            )
        ),
        fixed_keys,
        lambda: back(F.self_similarity_lse(random(n, d), scale=5.0, normalize=True)),
        lambda: back(F.self_similarity_lse(random(n, d), scale=5.0, ids=labels)),
        *(queue, bank, bank_scores, ema),
    ]
    if n == 0:
        return allow_nothing
    return [
        *allow_nothing,
        lambda: spread(random(n, d), random(n, d)),
        lambda: spread(random(n, d), random(n, d), normalize=False, negative_weight=0.7),
        others_are_closest,
        lambda: back(F.siglip(random(n, d), random(n, d), logit_scale=3.0, logit_bias=-1.0)),
        lambda: back(F.soft_cross_entropy(random(n, d), random(n, d).detach().softmax(1))),
        lambda: back(F.negative_cosine(random(n, d), random(n, d))),
        lambda: back(F.sup_con(random(n, d), labels)),
        lambda: back(F.info_nce(random(n, d), random(n, d), random(n, 9, d))),
        *(sinkhorn, distillation),
    ]


def main(wanted: list[str]) -> int:
    build()
    variables = environment() | {"PYTHONPATH": str(BUILD / "lib"), "FASTCL_BACKEND": "cpp"}
    # The chosen module is a narrow one, until it has told which ones run here.
    ask = (
        "from fastcl import _C; built = _C.build_record()['isas'];"
        "print(*(isa for isa in _C.kernels.supported_isas() if isa in built))"
    )
    told = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=BUILD,
        env=variables | {"FASTCL_ISA": "baseline"},
        capture_output=True,
        text=True,
    )
    if told.returncode != 0:
        print(told.stderr, file=sys.stderr)
        return 1
    failed = []
    for isa in wanted or told.stdout.split():
        command = [sys.executable, __file__, "--here"]
        if subprocess.run(command, cwd=BUILD, env=variables | {"FASTCL_ISA": isa}).returncode:
            failed.append(isa)
    if failed:
        print(f"fastcl: the sanitizers reported errors with {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        run_here()
    else:
        sys.exit(main(sys.argv[1:]))
