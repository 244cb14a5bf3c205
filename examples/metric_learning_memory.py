"""pytorch-metric-learning's trainer with NTXentLoss in a CrossBatchMemory, both of fastcl.

losses.CrossBatchMemory(losses.NTXentLoss(…), …)  ->  the same names of fastcl.compat
"""

import torch
from pytorch_metric_learning import samplers, trainers
from torch import nn

from fastcl.compat.pytorch_metric_learning import CrossBatchMemory, NTXentLoss

CLASSES, EACH, DIM = 8, 16, 32


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)  # (128,)
    points = torch.randn(CLASSES, DIM)[labels] + 1.5 * torch.randn(len(labels), DIM)
    trunk, embedder = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU()), nn.Linear(64, 16)
    loss = CrossBatchMemory(NTXentLoss(temperature=0.3), embedding_size=16, memory_size=256)
    trainer: trainers.MetricLossOnly

    def show(trainer) -> None:
        value = trainer.losses["metric_loss"].item()
        print(f"step {trainer.epoch * 2 + trainer.iteration - 2:2d}  loss {value:.4f}")

    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk, "embedder": embedder},
        optimizers={
            "trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=3e-3),
            "embedder_optimizer": torch.optim.Adam(embedder.parameters(), lr=3e-3),
        },
        batch_size=64,
        loss_funcs={"metric_loss": loss},
        dataset=torch.utils.data.TensorDataset(points, labels),
        sampler=samplers.MPerClassSampler(labels, m=4, length_before_new_iter=len(labels)),
        dataloader_num_workers=0,
        end_of_iteration_hook=show,
    )
    trainer.train(num_epochs=15)


if __name__ == "__main__":
    main()
