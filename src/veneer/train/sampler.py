"""The order of training rows: like lengths together, and nothing else in common between neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["LengthBatches"]

WINDOW = 16  # batches sorted together: little padding, and every batch still a random draw


class LengthBatches(Sampler[int]):
    """Rows in random order, sorted by length within windows of batches, the batches shuffled again.

    Sorting alone would feed long rows first and short ones last in every window, which a model learns as a trend and
    ends on. Each epoch has an order of its own, drawn from the seed, so a resumed run finds the same.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = self.batch * WINDOW
        rows: list[int] = []
        for first in range(0, len(order), window):
            rows += sorted(order[first : first + window], key=lambda row: self.lengths[row])
        batches = [rows[first : first + self.batch] for first in range(0, len(rows), self.batch)]
        last = [batches.pop()] if len(batches[-1]) < self.batch else []  # a short batch can only come last
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for part in shuffled + last for row in part])
