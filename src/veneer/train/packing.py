"""Rows put together to full length: texts cut as one stream, or whole rows side by side that do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

from veneer.train.encode import IGNORE
from veneer.train.errors import BaseModelError

__all__ = ["check_packing", "chunk", "pack", "place_rows"]

Row = tuple[list[int], list[int]]


def chunk(rows: Sequence[Row], limit: int) -> list[Row]:
    """(ids, labels) of texts, one after the other, cut every ``limit`` tokens.

    A piece begins with the last token of the one before, so that every token but the first is learned once.
    """
    ids = [token for row, _ in rows for token in row]
    starts = range(0, max(len(ids) - 1, 1), limit - 1)
    pieces = [ids[start : start + limit] for start in starts]
    return [(piece, [IGNORE, *piece[1:]]) for piece in pieces]


def place_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Row numbers in groups of at most ``limit`` tokens: longest rows first, each where the least room is left."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, group), sorted
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect_left(room, (lengths[row], -1))
        if at < len(room):
            free, group = room.pop(at)
            groups[group].append(row)
        else:
            free, group = limit, len(groups)
            groups.append([row])
        insort(room, (free - lengths[row], group))
    return groups


def pack(rows: Sequence[Row], limit: int) -> dict[str, list[Any]]:
    """Columns of packed rows: `input_ids`, `labels`, `length`, and `position_ids`, which begin anew with each row.

    ``rows`` are at most ``limit`` tokens long. A row's first label is left out: it would be predicted from the
    end of the row before.
    """
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": [], "length": []}
    for group in place_rows([len(ids) for ids, _ in rows], limit):
        columns["input_ids"].append([token for row in group for token in rows[row][0]])
        columns["labels"].append([x for row in group for x in (IGNORE, *rows[row][1][1:])])
        columns["position_ids"].append([place for row in group for place in range(len(rows[row][0]))])
        columns["length"].append(sum(len(rows[row][0]) for row in group))
    return columns


def check_packing(model: Any) -> None:
    """Run two packed rows and each alone.

    Raises:
        BaseModelError: the model lets packed rows see each other.
    """
    size = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device)[None] * 7919 % size
    places = torch.tensor([[*range(7), *range(5)]], device=device)
    training = model.training
    model.eval()
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=places, use_cache=False).logits[0, 7:].float()
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits[0].float()
    model.train(training)
    exact = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    error = float((together - alone).abs().max() / alone.abs().max())
    if not error <= exact:
        problem = f"{type(model).__name__} lets packed rows see each other (its scores change by {error:.2g})"
        raise BaseModelError(problem, key="options.packing", hint="Set `options.packing: none`, or `chunk` for texts.")
