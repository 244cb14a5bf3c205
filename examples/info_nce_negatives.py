"""info-nce-pytorch's InfoNCE with negatives that all queries share, on fastcl's kernels.

from info_nce import InfoNCE  ->  from fastcl.compat.info_nce import InfoNCE
"""

import torch
from torch import nn

from fastcl.compat.info_nce import InfoNCE


def main() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    loss_of = InfoNCE(temperature=0.1, negative_mode="unpaired")
    x, others = torch.randn(128, 32), torch.randn(512, 32)
    for step in range(20):
        query, positive = (encoder(x + 0.5 * torch.randn_like(x)) for _ in range(2))
        loss = loss_of(query, positive, encoder(others))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
