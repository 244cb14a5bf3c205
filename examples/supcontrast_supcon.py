"""Supervised contrastive training as SupContrast's main_supcon.py does it, with fastcl's loss.

from losses import SupConLoss  ->  from fastcl.compat.supcontrast import SupConLoss
"""

import torch
from torch import nn
from torch.nn.functional import normalize

from fastcl.compat.supcontrast import SupConLoss


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    criterion = SupConLoss(temperature=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    labels = torch.arange(128) % 8
    images = torch.randn(8, 32)[labels] + torch.randn(128, 32)
    for step in range(20):
        # As in the repository: both views in one batch, then (B, 2, D).
        both = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(2)])
        f1, f2 = normalize(model(both), dim=1).split(len(labels))
        features = torch.cat([f1.unsqueeze(1), f2.unsqueeze(1)], dim=1)
        loss = criterion(features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
