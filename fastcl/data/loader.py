"""Epochs of augmented batches, prepared in the background, from a position that can be saved.

    loader = Loader(data.pretrain, recipe, batch_size=256, seed=0, workers=1)
    for views, labels, indices in loader:           one epoch, or the rest of one
        …
        state = loader.state_dict()                 load_state_dict(state) goes on from here

Every random number is a function of (seed, epoch) for the order of the images, of (seed, epoch,
batch) for the views of a split in memory (and of the rank where several share a batch), and of
(seed, epoch, image) for those of a file. So the position is two integers, and neither the number of
workers nor how far they ran ahead changes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from fastcl.data.augment import Augmentation
from fastcl.data.splits import ReadSplit, Split, TensorSplit, none_readable

Batch = tuple[list[Tensor], Tensor, Tensor]  # views, labels (B,), indices (B,)
ORDER, VIEWS = 0, 1  # separate streams of random numbers


def generator_for(*key: int) -> Generator:
    """A generator that is a function of some non-negative integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return Generator().manual_seed(seed)


class Loader:
    """Iterates over the batches of an epoch: (views, labels (B,), indices (B,)).

    drop_last   leave out the last batch of an epoch when it is smaller
    rank, world give the images rank, rank + world, … of each batch: other processes give the others
    workers     threads (split in memory) or processes (files) that prepare batches ahead; 0: none

    Iterating goes to the end of the epoch from `batch`, the number of batches that it has already
    given; breaking off and iterating again goes on where it stopped. `epoch` counts from 0 and
    moves on at the end of the iteration.
    """

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation,
        *,
        batch_size: int,
        drop_last: bool = True,
        seed: int = 0,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if batch_size < world:
            raise ValueError(
                f"batch_size {batch_size} is less than the {world} processes there are"
            )
        if workers < 0:
            raise ValueError(f"workers must not be negative; got {workers}")
        if len(split) < (batch_size if drop_last else 1):
            raise ValueError(
                f"batch_size {batch_size} is more than the {len(split)} images there are"
            )
        self.split = split
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.workers = workers
        self.rank, self.world = rank, world
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        if self.batch >= len(self):
            self._next_epoch()
        order = torch.randperm(
            len(self.split), generator=generator_for(self.seed, ORDER, self.epoch)
        )
        shares = (whole[self.rank :: self.world] for whole in torch.split(order, self.batch_size))
        batches = list(enumerate(shares))[self.batch : len(self)]
        produce = self._from_memory if isinstance(self.split, TensorSplit) else self._from_files
        for result in produce(batches):
            self.batch += 1  # before the yield: who saves the position has this batch
            yield result
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The position, for a loader of the same split, augmentation, batch_size and drop_last."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.batch = state["seed"], state["epoch"], state["batch"]

    # A split in memory: whole batches through the vectorised augmentation, in threads

    def _from_memory(self, batches: list[tuple[int, Tensor]]) -> Iterator[Batch]:
        tasks = [partial(self._augment, self.epoch, number, indices) for number, indices in batches]
        if self.workers == 0:
            yield from (task() for task in tasks)
            return
        torch.get_num_threads()  # settles this thread's own number before one_thread sets another
        with ThreadPoolExecutor(self.workers, "augment", initializer=one_thread) as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for task in tasks:
                    ahead.append(pool.submit(task))
                    if len(ahead) > self.workers + 1:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _augment(self, epoch: int, number: int, indices: Tensor) -> Batch:
        assert isinstance(self.split, TensorSplit)
        share = () if self.world == 1 else (self.rank,)
        generator = generator_for(self.seed, VIEWS, epoch, number, *share)
        views = self.augmentation.views(self.split.images[indices], generator)
        return views, self.split.labels[indices], indices

    # Files: image by image, in processes

    def _from_files(self, batches: list[tuple[int, Tensor]]) -> Iterator[Batch]:
        assert isinstance(self.split, ReadSplit)
        images = FileViews(self.split, self.augmentation, self.seed, self.epoch)
        loader: Any = torch.utils.data.DataLoader(
            images,
            batch_sampler=[indices.tolist() for _, indices in batches],
            num_workers=self.workers,
            collate_fn=collate,
            generator=Generator(),  # else it draws from the global one, which resuming would miss
        )
        for views, labels, indices, unreadable in loader:
            self.split.report(unreadable)
            yield views, labels, indices


class FileViews(torch.utils.data.Dataset[Any]):
    """The views of image files in one epoch. In place of an unreadable one: the next readable."""

    def __init__(self, split: ReadSplit, augmentation: Augmentation, seed: int, epoch: int):
        self.split, self.augmentation, self.seed, self.epoch = split, augmentation, seed, epoch

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, int, list[int]]:
        unreadable = []
        while (image := self.split.read(index)) is None:
            unreadable.append(index)
            if len(unreadable) == len(self.split):
                raise ValueError(none_readable(self.split))
            index = (index + 1) % len(self.split)
        generator = generator_for(self.seed, VIEWS, self.epoch, index)
        views = self.augmentation.views_of(image, generator)
        return views, self.split.labels[index], index, unreadable


def collate(samples: list[tuple[list[Tensor], Tensor, int, list[int]]]) -> Any:
    """Samples -> (views, labels, indices, indices of unreadable files)."""
    views, labels, indices, unreadable = zip(*samples)
    stacked = [torch.stack(view) for view in zip(*views)]
    skipped = [index for indices in unreadable for index in indices]
    return stacked, torch.stack(labels), torch.tensor(indices), skipped


def one_thread() -> None:
    """One core for each preparing thread: a team would fight with the training for them."""
    torch.set_num_threads(1)
