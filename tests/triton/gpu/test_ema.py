"""The EMA kernel on a GPU, or as ttsem executes it: bfloat16, bounds, races."""

import pytest
import streaming
import torch

from fastcl.kernels import ema


@pytest.fixture(autouse=True)
def nothing_is_captured(monkeypatch):
    """torch asks the driver, which need not be there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "dtype, source_dtype",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_every_element_and_nothing_else(dtype, source_dtype, offset):
    streaming.check_ema_in_one_buffer(dtype, source_dtype, "cuda", offset)


def test_graph_capture_needs_one_call_before(monkeypatch):
    _, targets, _ = streaming.flat_views((5, 4097), torch.float32, "cuda", 0)
    _, sources, _ = streaming.flat_views((5, 4097), torch.float32, "cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before capturing"):
        ema.update_(targets, sources, momentum=0.9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ema.update_(targets, sources, momentum=0.9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    streaming.check_ema(targets, sources, 0.9)
    kept = next(reversed(ema._captured.values()))
    assert kept is next(reversed(ema._groups.values()))
