"""Masked tokens drawn anew in each pass over the rows, from the seed, the pass and the row alone.

A draw that hangs on nothing else is the same whatever was drawn before it, so a run that is taken up again in the
middle masks the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from veneer.train.collate import Batch, Collator
from veneer.train.encode import IGNORE

__all__ = ["MaskingCollator", "mask_row"]


@dataclass
class MaskingCollator:
    """Batches of a masked language model.

    Rows hold `input_ids`, `words` (the word of each token, -1 for one that is never masked) and `row`: the row's
    number, negative for a test row, whose mask is the same in every pass and under every seed.
    """

    inner: Collator
    mask_id: int
    vocabulary: Sequence[int]
    share: float
    seed: int = 0
    epoch: int = field(default=0)

    def __call__(self, features: list[dict[str, Any]]) -> Batch:
        return self.inner([self._mask(feature) for feature in features])

    def _mask(self, feature: dict[str, Any]) -> dict[str, Any]:
        row = feature["row"]
        draw = (self.seed, self.epoch, row) if row >= 0 else (0, 0, row)
        digest = hashlib.blake2b(repr(draw).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        ids, labels = mask_row(
            feature["input_ids"], feature["words"], self.share, self.mask_id, self.vocabulary, generator
        )
        return {**{k: v for k, v in feature.items() if k not in ("row", "words")}, "input_ids": ids, "labels": labels}


def mask_row(
    ids: Sequence[int],
    words: Sequence[int],
    share: float,
    mask_id: int,
    vocabulary: Sequence[int],
    generator: torch.Generator,
) -> tuple[list[int], list[int]]:
    """Choose whole words at random until ``share`` of the tokens is reached; at least one word.

    Of the chosen tokens 80 % become the mask, 10 % a token of ``vocabulary`` and 10 % stay (Devlin et al. 2018,
    section 3.1). Returns the new ids and the labels, -100 where nothing was chosen.
    """
    places: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        if word >= 0:
            places.setdefault(word, []).append(place)
    groups = list(places.values())
    wanted = max(1, round(share * sum(map(len, groups))))
    chosen: list[int] = []
    for index in torch.randperm(len(groups), generator=generator).tolist():
        if len(chosen) >= wanted:
            break
        chosen += groups[index]
    out, labels = list(ids), [IGNORE] * len(ids)
    draws = torch.rand(len(chosen), generator=generator).tolist()
    others = torch.randint(len(vocabulary), (len(chosen),), generator=generator).tolist()
    for place, draw, other in zip(chosen, draws, others):
        labels[place] = ids[place]
        if draw < 0.9:
            out[place] = mask_id if draw < 0.8 else vocabulary[other]
    return out, labels
