"""What a loss over the rows of W ranks costs each of them: bytes, operations, memory, seconds.

A rank has r rows of D features (NT-Xent: both views of its images), all ranks R = W·r; e is the
bytes of an element, U = r·D, A = R·D. Counted from fastcl/distributed.py, _functional/_across.py.

    operations    passes · 2·r·R·D                               passes: 1 forward + 3 backward
    gather        keys, twice         all-gather       (W − 1) · U·e      each
                  keys' gradients     reduce-scatter   (W − 1) · U·4          NCCL
                                      all-to-all       (W − 1) · U·e          gloo
    ring          keys, twice         W − 1 exchanges of U·e      each
                  keys' gradients     W exchanges of U·4
    CLIP, both    columns' parts      all-to-all       (W − 1) · r·4
                  columns, gradients  two all-gathers  (W − 1) · r·4      each

    seconds       operations / rate  +  steps · latency  +  bytes / bandwidth

Nothing overlaps. Each collective takes W − 1 steps, as rings of NCCL and gloo do. gloo has no
reduce-scatter: each rank is sent the parts of its own rows, and adds them up itself.

    memory        the most that is alive at once, beside the inputs and their gradients
    gather        while gradients are scattered: keys' gradients A·e, and as much that is received
                  (gloo), or a padded copy A·4 (NCCL)
    ring          keys and their gradients that are here, and a part of each: a few U, whatever W

The kernels' own packed operands are left out, which they keep from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("gather", "ring")
LOSSES = {"nt_xent": 2, "clip": 1}  # -> rows an image (of each side, for CLIP)
BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True)
class Case:
    """A loss on every rank's `images` images, of D features, in elements of `itemsize` bytes."""

    loss: str
    kind: str
    world: int
    images: int  # of a rank
    features: int
    itemsize: int = 4
    backend: str = "gloo"
    passes: float = 4.0  # over the similarities, forward and backward together

    @property
    def rows(self) -> int:
        return self.images * LOSSES[self.loss]

    @property
    def own(self) -> int:
        """Elements of a rank's rows: U."""
        return self.rows * self.features

    @property
    def columns(self) -> bool:
        return self.loss == "clip"


@dataclass(frozen=True)
class Machine:
    """What a rank can do: operations and bytes a second, seconds a message."""

    flops: float
    bandwidth: float
    latency: float


def flops(case: Case) -> float:
    """Floating-point operations of a rank."""
    return case.passes * 2 * case.rows * (case.world * case.rows) * case.features


def traffic(case: Case) -> list[tuple[str, int, int]]:
    """(what, steps between neighbours, bytes that a rank receives) of a forward and backward."""
    others, own = case.world - 1, case.own
    found = [("sizes", others, 8 * others)]
    if case.kind == "gather":
        found += [("keys", 2 * others, 2 * others * own * case.itemsize)]
        width = case.itemsize if case.backend == "gloo" else 4
        found += [("keys' gradients", others, others * own * width)]
    else:
        rounds = case.world if others else 0
        found += [("keys", 2 * others, 2 * others * own * case.itemsize)]
        found += [("keys' gradients", rounds, rounds * own * 4)]
    if case.columns:
        found += [("columns", 3 * others, 3 * others * case.rows * 4)]
    return found


def received(case: Case) -> int:
    return sum(size for _, _, size in traffic(case))


def seconds(case: Case, machine: Machine) -> dict[str, float]:
    """compute, communication, and both."""
    compute = flops(case) / machine.flops
    steps = sum(steps for _, steps, _ in traffic(case))
    communication = steps * machine.latency + received(case) / machine.bandwidth
    return {"compute": compute, "communication": communication, "step": compute + communication}


def peak_bytes(case: Case) -> int:
    """The most that is alive at once in a rank, beside the loss's inputs and their gradients."""
    e, own = case.itemsize, case.own
    everything = case.world * own
    held = own * e if case.loss == "nt_xent" else 0  # both views in one
    held += 2 * case.images * case.features * e  # gradients of the positives' term
    held += 8 * case.world * case.rows  # numbers of all rows
    gloo = case.backend == "gloo"
    if case.kind == "gather":
        gathering = everything * e * (2 if gloo else 1)  # gloo's own copy of the result
        kernel = own * e + 2 * everything * e  # gradients of query and keys, keys
        scattering = own * e + everything * e + everything * (e if gloo else 4) + own * 4
        return held + max(gathering + own * e, kernel, scattering)
    totals = 2 * own * 4  # gradients of the query, and of the keys that are here
    visitors = own * e if case.world > 1 else 0
    parts = 2 * own * e  # of this block
    passing = max(own * e, own * 4) if case.world > 1 else 0  # what is received
    return held + totals + visitors + max(parts, passing)
