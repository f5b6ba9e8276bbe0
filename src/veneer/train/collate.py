"""Rows of different lengths to one batch, padded to its longest row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from veneer.train.encode import IGNORE
from veneer.train.processes import mine

__all__ = ["Collator", "GroupCollator", "batches", "pad_batch"]

Batch = dict[str, torch.Tensor]


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
    """A training batch: `input_ids`, `attention_mask` and the rows' other columns, padded on the right.

    Lists of whole numbers are padded to (rows, longest), `labels` with -100 and others with 0, and so are `weights`,
    one number a token; numbers become (rows,), lists of other numbers (rows, n). ``multiple_of`` rounds the length up;
    accelerators like 8, a CPU gains nothing from it. `length` is left out.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, features: list[dict[str, Any]]) -> Batch:
        ids = [feature["input_ids"] for feature in features]
        batch = {
            "input_ids": pad_batch(ids, self.pad_token_id, multiple_of=self.multiple_of),
            "attention_mask": pad_batch([[1] * len(row) for row in ids], 0, multiple_of=self.multiple_of),
        }
        for name in features[0]:
            if name not in ("input_ids", "length"):
                batch[name] = self._column(name, [feature[name] for feature in features])
        return batch

    def _column(self, name: str, values: list[Any]) -> torch.Tensor:
        if isinstance(values[0], list) and all(isinstance(item, int) for value in values for item in value):
            return pad_batch(values, IGNORE if name == "labels" else 0, multiple_of=self.multiple_of)
        if name == "weights":  # one a token
            padded = pad_batch([[0] * len(value) for value in values], 0, multiple_of=self.multiple_of).float()
            for row, value in zip(padded, values, strict=True):
                row[: len(value)] = torch.tensor(value)
            return padded
        return torch.tensor(values)


@dataclass(frozen=True)
class GroupCollator:
    """Batches of rows that belong together: features hold `chosen_input_ids`, `rejected_input_ids` and so on.

    The rows of a batch are side 0, 1, ... of the first feature, then those of the second. Columns of no side keep
    one entry a feature.
    """

    inner: Collator
    sides: tuple[str, ...]

    def __call__(self, features: list[dict[str, Any]]) -> Batch:
        sides = [side for side in self.sides if f"{side}_input_ids" in features[0]]
        names = {side: [name for name in features[0] if name.startswith(f"{side}_")] for side in sides}
        rows = [
            {name.removeprefix(f"{side}_"): feature[name] for name in names[side]}
            for feature in features
            for side in sides
        ]
        taken = {name for side in sides for name in names[side]} | {"length"}
        rest = {name: torch.tensor([f[name] for f in features]) for name in features[0] if name not in taken}
        return self.inner(rows) | rest


def batches(rows: Any, collate: Any, size: int, device: torch.device) -> Iterator[tuple[list[int], Batch]]:
    """Rows of like lengths together, each batch with its rows' numbers; ``rows`` have a `length` column.

    Where several processes share the rows (processes.py), this one's batches.
    """
    order = sorted(range(len(rows)), key=list(rows["length"]).__getitem__)
    for part in mine([order[first : first + size] for first in range(0, len(order), size)]):
        columns = rows[part]
        features = [{name: values[place] for name, values in columns.items()} for place in range(len(part))]
        yield part, {key: value.to(device) for key, value in collate(features).items()}
