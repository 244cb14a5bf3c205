"""How many products a call makes, in units of G = 2·N·M·D: what docs/losses.md says of GPUs.

Counted from the launches: the tiles that all programs go through, and the products of a tile.
"""

import inspect
from collections import defaultdict

import pytest
import torch
from triton.runtime.jit import JITFunction

from bench.compiled import compiling_for
from bench.gpu_launches import PRODUCTS
from fastcl.kernels import instance_spread, pair_sigmoid, self_similarity_lse, similarity_lse

N = 16384


@pytest.fixture
def counted(monkeypatch):
    """Operations of each kernel. finish_kernel's products are for columns that lost terms."""
    operations = defaultdict(float)

    def run(self, *args, grid, warmup, **kwargs):
        if self.fn.__name__ not in PRODUCTS:
            return
        o = {**dict(zip(inspect.signature(self.fn).parameters, args)), **kwargs}
        rows, columns = o.get("BLOCK_X") or o["BLOCK_N"], o.get("BLOCK_Y") or o["BLOCK_M"]
        tile, programs = rows * columns * o["D"], grid[0]
        if self.fn.__name__ == "weights_kernel":
            trips = 1
        elif self.fn.__name__ == "pairs_kernel":
            blocks, programs = -(-o["N"] // rows), o["tiles"]
            trips = blocks
            if o["SELF"]:  # those above the diagonal, on average of these tiles
                trips = (o["first_tile"] + (o["tiles"] - 1) / 2) * (columns // rows)
        elif o.get("SELF") and "TILE" in o:  # the squares on it
            trips = o["TILE"] // columns
        else:
            programs //= o.get("splits") or o["chunks"]
            trips = -(-(o.get("NY") or o.get("M") or o["rows"]) // columns)
            if self.fn.__name__ == "sums_kernel":
                tile = rows * columns * min(o["BLOCK_V"], o["D"])
            elif "BLOCK_X" in o:
                tile *= 2
        operations[self.fn.__name__] += 2 * programs * trips * tile

    with compiling_for(90):
        monkeypatch.setattr(JITFunction, "run", run)
        with torch.device("meta"):
            yield operations


def passes(operations, d):
    return sum(operations.values()) / (2 * N * N * d)


# Half precision up to 256 features (InvaSpread 128, and so with ids) sums whole rows, which makes
# the scores anew for each gradient. Otherwise panels, which two gradients share.
CASES = [
    (torch.bfloat16, 128, False),
    (torch.bfloat16, 256, False),
    (torch.bfloat16, 512, True),
    (torch.float16, 2048, True),
    (torch.float32, 64, True),
    (torch.float32, 512, True),
    (torch.float32, 2048, True),
]
TABLE = pytest.mark.parametrize(
    "dtype, d, panels", CASES, ids=[f"D{d}-{str(t).removeprefix('torch.')}" for t, d, _ in CASES]
)


@TABLE
def test_two_towers(counted, dtype, d, panels):
    q, k, v, t = (torch.empty(N, d, dtype=dtype), torch.empty(N, d, dtype=dtype),
                  torch.empty(N), torch.empty(()))  # fmt: skip
    similarity_lse.forward(q, k, t, None, None, normalize=True, rows=True, columns=True)
    similarity_lse.backward(
        v, v, q, k, t, None, None, v, v, normalize=True, need_query=True, need_key=True
    )
    assert passes(counted, d) == pytest.approx(4 if panels else 5, rel=0.05)
    counted.clear()
    pair_sigmoid.forward(q, k, t, t, normalize=True)
    pair_sigmoid.backward(v, q, k, t, t, normalize=True)
    assert passes(counted, d) == pytest.approx(4 if panels else 5, rel=0.05)


@TABLE
def test_one_gradient(counted, dtype, d, panels):
    q, k, t = torch.empty(N, d, dtype=dtype), torch.empty(N, d, dtype=dtype), torch.empty(())
    v = torch.empty(N)
    for need in (True, False):
        counted.clear()
        similarity_lse.forward(q, k, t, None, None, normalize=True, rows=True, columns=False)
        similarity_lse.backward(
            v, None, q, k, t, None, None, v, None, normalize=True,
            need_query=need, need_key=not need,
        )  # fmt: skip
        assert passes(counted, d) == pytest.approx(3, rel=0.05)
    counted.clear()
    similarity_lse.forward_with_mean(q, k, t, None, None, normalize=True)
    whole = not panels or (dtype == torch.float32 and d <= 128)
    assert passes(counted, d) == pytest.approx(2 if whole else 3, rel=0.05)


@TABLE
def test_one_set_of_rows(counted, dtype, d, panels):
    z, v, t = torch.empty(N, d, dtype=dtype), torch.empty(N), torch.empty(())
    self_similarity_lse.forward(z, t, None, normalize=True)
    self_similarity_lse.backward(v, z, t, None, v, normalize=True)
    # Of 4 × 4 panels the 10 on and above the diagonal.
    assert passes(counted, d) == pytest.approx(0.5 + (1 + 10 / 16 if panels else 2), rel=0.05)
    options = dict(negative_weight=1.0, normalize=True)
    for detach in (False, True):
        counted.clear()
        _, *saved = instance_spread.forward(z, t, **options)
        instance_spread.backward(v, z, t, *saved, detach_columns=detach, **options)
        symmetric = (panels or d > 128) and not detach
        expected = 2 + (1 + 10 / 16 if symmetric else 2)
        assert passes(counted, d) == pytest.approx(expected, rel=0.05)
