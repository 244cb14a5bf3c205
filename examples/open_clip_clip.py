"""A tiny CLIP under open_clip's own training loop, open_clip_train.train.train_one_epoch.

with fastcl.compat.patch("open_clip"): …      swaps ClipLoss where open_clip's code makes it
"""

import logging
from types import SimpleNamespace

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip_train.train import train_one_epoch

import fastcl.compat

N, BATCH, WORDS = 64, 32, 8

ARGS = SimpleNamespace(
    device="cpu", precision="fp32", batch_size=BATCH, accum_freq=1, distill=False,
    skip_scheduler=True, grad_clip_norm=1.0, log_every_n_steps=1, wandb=False, rank=0, local_rank=0,
    world_size=1, horovod=False, local_loss=False, gather_with_grad=False, model="tiny",
    siglip=False, loss_dist_impl=None, distributed=False,
)  # fmt: skip


class Pairs:
    """What open_clip_train calls a data info: a loader, and set_epoch."""

    def __init__(self) -> None:
        images = torch.randn(N, 3, 16, 16)
        texts = torch.randint(1, 60, (N, WORDS))
        texts[:, -1] = 63  # the end-of-text token is the largest
        pairs = torch.utils.data.TensorDataset(images, texts)
        self.dataloader = torch.utils.data.DataLoader(pairs, BATCH, shuffle=True)
        self.dataloader.num_batches = N // BATCH
        self.dataloader.num_samples = N

    def set_epoch(self, epoch: int) -> None:
        pass


class Losses:
    """A TensorBoard writer's one method; prints the loss."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            print(f"step {step:2d}  loss {value:.4f}")


def main() -> None:
    torch.manual_seed(0)
    logging.getLogger().setLevel(logging.WARNING)
    model = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=CLIPTextCfg(context_length=WORDS, vocab_size=64, width=32, heads=2, layers=1),
        output_dict=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = {"train": Pairs()}
    with fastcl.compat.patch("open_clip"):
        loss = open_clip.create_loss(ARGS)
        assert type(loss).__module__.startswith("fastcl")
        for epoch in range(12):
            train_one_epoch(
                model, data, loss, epoch, optimizer, None, None, None, ARGS, tb_writer=Losses()
            )


if __name__ == "__main__":
    main()
