"""AlexNet with batch norm after every layer, as CMC uses it: half of the width for each view.

    convolutions   96 of 11×11 stride 4, 256 of 5×5, 384, 384 and 256 of 3×3; pooled after 1, 2, 5
    linear         4096, 4096

Source: Krizhevsky et al. 2012; Tian et al. 2020, arXiv:1906.05849.
"""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """images (N, C, 224, 224) -> (N, 4096 · width), the activations of the second linear layer."""

    def __init__(self, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = [round(width * c) for c in (96, 256, 384, 384, 256)]
        shapes = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
        parts: list[nn.Module] = []
        inputs = in_channels
        for i, (outputs, shape) in enumerate(zip(channels, shapes, strict=True)):
            parts += [nn.Conv2d(inputs, outputs, *shape, bias=False)]
            parts += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            if i in (0, 1, 4):
                parts.append(nn.MaxPool2d(3, 2))
            inputs = outputs
        self.feature_dim = round(width * 4096)
        parts.append(nn.Flatten())
        for features in (inputs * 6 * 6, self.feature_dim):
            parts += [nn.Linear(features, self.feature_dim, bias=False)]
            parts += [nn.BatchNorm1d(self.feature_dim), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features
