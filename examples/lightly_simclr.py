"""SimCLR with lightly: its head, the loop of its tutorials, and fastcl's NTXentLoss.

from lightly.loss import NTXentLoss  ->  from fastcl.compat.lightly import NTXentLoss
"""

import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

from fastcl.compat.lightly import NTXentLoss


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.projection_head = SimCLRProjectionHead(64, 64, 32)

    def forward(self, x):
        return self.projection_head(self.backbone(x))  # (N, 32)


def views(images):
    """Two noisy views of each image, of another brightness each."""
    shape = (len(images), 1, 1, 1)
    return [
        images * (0.7 + 0.6 * torch.rand(shape)) + 0.1 * torch.randn_like(images) for _ in range(2)
    ]


def main() -> None:
    torch.manual_seed(0)
    images = torch.rand(128, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    model = SimCLR()
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(20):
        x0, x1 = views(images)
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
