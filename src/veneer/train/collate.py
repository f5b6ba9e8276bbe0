"""Rows of different lengths to one batch, padded to its longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from veneer.train.encode import IGNORE

__all__ = ["Collator", "pad_batch"]


def pad_batch(
    rows: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"] = "right", multiple_of: int = 1
) -> torch.Tensor:
    """Lists of ids to one tensor (rows, longest), `pad` filling the other places. dtype int64."""
    longest = max((len(row) for row in rows), default=0)
    width = -(-longest // multiple_of) * multiple_of
    out = torch.full((len(rows), width), pad, dtype=torch.long)
    for index, row in enumerate(rows):
        if len(row):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            out[index, place] = torch.tensor(row, dtype=torch.long)
    return out


@dataclass(frozen=True)
class Collator:
    """A training batch: `input_ids`, `attention_mask`, `labels`, each (rows, longest), padded on the right.

    ``multiple_of`` rounds the length up; accelerators like 8, a CPU gains nothing from it.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [feature["input_ids"] for feature in features]
        ones = [[1] * len(row) for row in ids]
        labels = [feature["labels"] for feature in features]
        return {
            "input_ids": pad_batch(ids, self.pad_token_id, multiple_of=self.multiple_of),
            "attention_mask": pad_batch(ones, 0, multiple_of=self.multiple_of),
            "labels": pad_batch(labels, IGNORE, multiple_of=self.multiple_of),
        }
