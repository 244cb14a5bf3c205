"""What every shipped launch must satisfy, of the reports that bench.compiled makes."""

from bench.compiled import (
    TENSOR_INSTRUCTION,
    Compiled,
    Report,
    compiling_for,
    count,
    examine,
    tensor_instructions,
)
from fastcl.kernels import configs

__all__ = ["Compiled", "Report", "assert_within_budget", "compiling_for", "examine"]


def assert_within_budget(report: Report, *, tensor_cores: bool = False, blocks: int = 1) -> None:
    """No spills, no serialised wgmma, shared memory within the GPU's limit.

    tensor_cores: the main loop must use this generation's tensor-core instruction and no older
    one. blocks: how many blocks must fit on a multiprocessor.
    """
    assert report.spill_bytes == 0, f"registers spill: {report}"
    assert report.stack_bytes == 0, f"a stack frame of {report.stack_bytes} B: {report}"
    limit = configs.SHARED_MEMORY[report.target]
    assert report.shared_bytes <= limit, f"needs more than {limit} B of shared memory: {report}"
    assert not report.wgmma_serialised, f"{report.warnings}: {report}"
    fit = report.blocks_per_multiprocessor
    assert fit >= blocks, f"{fit} blocks fit on a multiprocessor: {report}"
    if tensor_cores:
        loop = report.main_loop
        wanted = TENSOR_INSTRUCTION[report.target]
        if isinstance(report.target, str):
            assert tensor_instructions(loop) > 0, f"no {wanted} in the main loop: {report}"
            return
        assert count(loop, wanted) > 0, f"no {wanted} in the main loop: {report}"
        if wanted != "HMMA":
            assert count(loop, "HMMA") == 0, f"mma.sync in the main loop: {report}"
