"""What surrounds the launches: other sizes compile nothing anew, and the host never waits.

A host function that reads a value of a tensor waits for the GPU, and a CUDA graph cannot capture
it. On the meta device there are no values: reading one raises. What would copy numbers from the
host is found by the operators that it needs.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.compiled import compiling_for
from bench.gpu_launches import LAUNCHES, WITH_IDS, Case
from fastcl.kernels import configs, ema, similarity_lse

# Above 8,192 columns pairs_kernel is launched several times, and finish_kernel has three forms for
# the first launch, those between and the last; below there is one. 20,000 and 300 meet all.
FIRST = (20000, 300)
OTHERS = (1, 3, 16, 17, 1000, 8191, 8193, 100003)


def compiled_for(target, word, case):
    with compiling_for(target) as launches:
        LAUNCHES[word](case)
    return {id(launch.kernel): f"{launch.name} {launch.options}" for launch in launches}


# Rows of 300 features are summed by panels, of which 20,000 rows have 25, and 15 where W is
# symmetric; 100,003 would have hundreds.
BY_PANELS = [("pair_sigmoid", 300), ("self_similarity_lse", 300)]


@pytest.mark.parametrize(
    "word, d", [(word, d) for word in LAUNCHES for d in (128, 100)] + BY_PANELS
)
def test_other_numbers_of_rows_compile_nothing(word, d):
    case = Case(d, torch.bfloat16, ids=word in WITH_IDS)
    known = {}
    for n in FIRST:
        known.update(compiled_for(90, word, replace(case, n=n)))
    for n in OTHERS if d < 300 else OTHERS[:-1]:
        new = compiled_for(90, word, replace(case, n=n))
        assert not new.keys() - known.keys(), (n, [new[k] for k in new.keys() - known.keys()])


def test_other_numbers_of_keys_compile_nothing():
    """For two towers N and M vary by themselves."""
    known = set()
    for n, m in [(300, 20000), (20000, 300), (1, 7), (4097, 8192), (33, 8200), (100003, 17)]:
        q, k = (torch.empty(rows, 128, dtype=torch.bfloat16) for rows in (n, m))
        g, h, t = torch.empty(n), torch.empty(m), torch.empty(())
        with compiling_for(90) as launches:
            for columns in (False, True):
                similarity_lse.forward(
                    q, k, t, None, None, normalize=True, rows=True, columns=columns
                )
            similarity_lse.forward_with_mean(q, k, t, None, None, normalize=True)
            similarity_lse.backward(
                g, h, q, k, t, None, None, g, h, normalize=True, need_query=True, need_key=True
            )
        new = {id(launch.kernel) for launch in launches} - known
        assert not (known and new) or (n, m) == (20000, 300), (n, m)
        known |= new


class NothingFromTheHost(TorchDispatchMode):
    """Forbids what waits for the device or copies from the host's memory."""

    FORBIDDEN = (
        "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal",
        "is_nonzero", "lift_fresh", "_to_copy",
    )  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix(".default")
        assert not name.startswith(self.FORBIDDEN), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("n, d", [(300, 100), (20000, 100), (300, 300), (20000, 300)])
@pytest.mark.parametrize("word", [word for word in LAUNCHES if word != "ema"])
def test_the_host_reads_no_value(word, n, d):
    case = Case(d, torch.float16, ids=word in WITH_IDS, n=n)
    with compiling_for(90, only=lambda name: False), torch.device("meta"), NothingFromTheHost():
        LAUNCHES[word](case)


def test_the_host_reads_no_value_from_the_second_update_of_a_list_on():
    """The first builds the table of addresses; see kernels/ema.py."""
    targets, sources = [torch.zeros(3, 5)], [torch.zeros(3, 5)]
    with compiling_for(90, only=lambda name: False):
        ema.update_(targets, sources, momentum=0.9)
        with NothingFromTheHost():
            ema.update_(targets, sources, momentum=0.5)


def test_reading_a_value_is_seen():
    with pytest.raises(RuntimeError, match="meta"), torch.device("meta"):
        torch.empty(()).item()
    with pytest.raises(RuntimeError, match="meta"), torch.device("meta"):
        bool(torch.empty(()) > 0)
    with pytest.raises(AssertionError, match="waits for the device"), NothingFromTheHost():
        torch.ones(3).nonzero()
    with pytest.raises(AssertionError, match="waits for the device"), NothingFromTheHost():
        torch.tensor(1.0)


def test_a_value_that_is_compiled_in_is_seen():
    """Sizes as constexprs would be new kernels: so would another block be."""
    known = compiled_for(90, "pair_sigmoid", Case(n=300))
    with configs.override(pair_sigmoid_loss=dict(BLOCK_M=32)):
        assert compiled_for(90, "pair_sigmoid", Case(n=300)).keys() - known.keys()
