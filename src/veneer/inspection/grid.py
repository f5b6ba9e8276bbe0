"""Layers on a grid of blocks and modules, for heat maps of any of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "Grid", "grid_of"]


@dataclass(frozen=True)
class Cell:
    """shade: the value between the smallest and the largest of the grid, 0 to 1."""

    row: Any
    value: float
    shade: float


@dataclass(frozen=True)
class Grid:
    """cells[i][j]: block i, module j; None where there is no such layer."""

    modules: list[str]
    blocks: list[int]
    cells: list[list[Cell | None]]
    low: float
    high: float


def grid_of(rows: Sequence[Any], value: str) -> Grid | None:
    """Rows that have `block`, `module` and a number under `value` as a grid; None where they form none."""
    found = {
        (row.block, row.module): (row, float(getattr(row, value)))
        for row in rows
        if row.block is not None and math.isfinite(getattr(row, value))
    }
    modules = list(dict.fromkeys(module for _, module in found))
    blocks = sorted({block for block, _ in found})
    if not found or len(blocks) * len(modules) > 4 * len(found):
        return None  # names that do not form a grid would make a map of holes
    values = [v for _, v in found.values()]
    low, high = min(0.0, *values), max(values)
    span = (high - low) or 1.0

    def cell(block: int, module: str) -> Cell | None:
        hit = found.get((block, module))
        return None if hit is None else Cell(hit[0], hit[1], (hit[1] - low) / span)

    return Grid(modules, blocks, [[cell(b, m) for m in modules] for b in blocks], low, high)
