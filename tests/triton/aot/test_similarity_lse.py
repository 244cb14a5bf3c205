"""What the similarity kernels must show beyond the budget of test_matrix.py, at D = 128.

There the exponentials weigh most: where another block fits beside each, it hides them.
"""

import budget
import pytest
import torch

from bench.compiled import exponentials
from bench.gpu_launches import LAUNCHES, Case
from fastcl.kernels import configs, self_similarity_lse

MAIN = ("rows_kernel", "pairs_kernel", "gradient_kernel", "mean_kernel")
SIDE_BY_SIDE = {"rows_kernel": 2, "pairs_kernel": 2}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_blocks_side_by_side_and_one_exponential_a_score(arch):
    with budget.compiling_for(arch, MAIN.__contains__) as launches:
        LAUNCHES["similarity_lse"](Case(128))
    assert {launch.name for launch in launches} == set(MAIN)
    for launch in {launch.kernel.hash: launch for launch in launches}.values():
        report = budget.examine(launch)
        budget.assert_within_budget(
            report, tensor_cores=True, blocks=SIDE_BY_SIDE.get(report.name, 1)
        )
        o = report.options
        scores = o.get("BLOCK_N", o.get("BLOCK_X", 0)) * o.get("BLOCK_M", o.get("BLOCK_Y", 0))
        threads = 32 * report.warps
        # Few others: the online maximum rescales a sum for each row.
        assert 0 <= exponentials(report.main_loop) - scores // threads <= 4, str(report)


def test_a_row_that_is_too_large_is_refused():
    """What the table avoids: the gate would stop it."""
    with configs.override(similarity_gradient=dict(BLOCK_X=128, BLOCK_Y=128, num_warps=4)):
        z, vector = torch.zeros(16384, 128, dtype=torch.bfloat16), torch.zeros(16384)
        with budget.compiling_for(90) as kernels:
            self_similarity_lse.backward(vector, z, torch.tensor(1.0), None, vector, normalize=True)
    report = next(r for r in map(budget.examine, kernels) if r.name == "gradient_kernel")
    with pytest.raises(AssertionError, match="registers spill"):
        budget.assert_within_budget(report, tensor_cores=True)
