"""The order of training rows."""

from __future__ import annotations

import itertools
import random

from veneer.train.sampler import LengthBatches

RNG = random.Random(0)
LENGTHS = [RNG.randint(5, 100) for _ in range(403)]


def test_every_row_once_an_epoch_and_a_new_order_each() -> None:
    sampler = LengthBatches(LENGTHS, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(403))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthBatches(LENGTHS, 4, seed=3)) == first


def test_little_padding_and_no_trend() -> None:
    order = list(LengthBatches(LENGTHS, 4, seed=0))
    batches = [[LENGTHS[row] for row in order[i : i + 4]] for i in range(0, 400, 4)]
    padded = sum(max(b) * len(b) for b in batches) / sum(map(sum, batches))
    assert padded < 1.1  # about 1.5 for random batches of these lengths
    means = [sum(b) / 4 for b in batches]
    rising = sum(b > a for a, b in itertools.pairwise(means))
    assert 30 < rising < 70  # neighbouring batches go up as often as down
