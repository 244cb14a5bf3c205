from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden():
    """The arrays of a golden file (tests/golden/README.md)."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture
def no_encoder():
    """An encoder that gives its images back: the golden files begin at the features."""

    def make(feature_dim):
        encoder = torch.nn.Identity()
        encoder.feature_dim = feature_dim
        return encoder

    return make


@pytest.fixture
def tiny_encoder():
    """The smallest encoder that has a convolution and a batch norm."""

    def make():
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3, stride=2),
            torch.nn.BatchNorm2d(6),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        encoder.feature_dim = 6
        return encoder

    return make
