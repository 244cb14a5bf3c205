"""MoCo in plain PyTorch with a queue of a million keys, whose logits are never stored.

    logits = cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / τ
    cross_entropy(logits, zeros)                 ->  F.info_nce(q, k, queue.features)

The queue is read in place: no clone, and beside it memory grows with the batch only. Its oldest
rows are overwritten after the backward pass.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.nn import FeatureQueue, momentum_copy

SIGNAL, NOISE, DIM = 16, 48, 64


def view(signal):
    """An image's own features beside others that are new in every view."""
    return torch.cat((signal, torch.randn(len(signal), NOISE)), 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="MoCo with a queue of a million rows")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    encoder = nn.Linear(SIGNAL + NOISE, DIM)
    key_encoder = momentum_copy(encoder)
    queue = FeatureQueue(args.rows, DIM)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.03)
    for step in range(args.steps):
        signal = torch.randn(64, SIGNAL)
        q = encoder(view(signal))  # (64, DIM)
        with torch.no_grad():
            F.ema_update_(key_encoder, encoder, momentum=0.5)
            k = normalize(key_encoder(view(signal)), dim=1)
        loss = F.info_nce(q, k, queue.features, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.push(k)
        print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
