"""The pages of `veneer inspect` and `veneer diff`: one file each, with style, script and charts inline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..train.charts import Series, line_chart
from ..train.report import flatten, page_environment
from ..version import __version__
from .grid import grid_of

if TYPE_CHECKING:
    from .compare import Comparison
    from .layers import LayerDelta, TensorInfo

__all__ = ["ERRORS", "render_diff", "render_inspection", "write_page"]

ERRORS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Errors for which the page says how far the rank can be cut."""

DIGITS = {"rank": "%.1f", "used": "%.0f"}


def render_inspection(
    title: str,
    layers: Sequence[LayerDelta],
    tensors: Sequence[TensorInfo] = (),
    *,
    config: dict[str, Any] | None = None,
    error: float = 0.1,
    notes: Sequence[str] = (),
) -> str:
    """The page as text. layers may be empty (prompt methods): then the page is about the tensors."""
    maps = [
        _map("relative norm", layers, "relative_norm", "%.3f"),
        _map("effective rank", layers, "effective_rank", "%.1f"),
        _map("norm of delta", layers, "delta_norm", "%.3g"),
        _map("norm of A", [x for x in layers if x.a_norm is not None], "a_norm", "%.3g"),
        _map("norm of B", [x for x in layers if x.b_norm is not None], "b_norm", "%.3g"),
    ]
    return page_environment().get_template("inspect.html.j2").render(
        title=title,
        version=__version__,
        layers=layers,
        tensors=tensors,
        error=error,
        cuts=[(e, sum(x.rank_for(e) for x in layers), max((x.rank_for(e) for x in layers), default=0)) for e in ERRORS],
        total_rank=sum(min(x.r, len(x.singular_values)) for x in layers),
        maps=[m for m in maps if m is not None],
        charts=_charts(layers),
        idle=[x.name for x in layers if x.learned_nothing],
        middle=median(x.relative_norm for x in layers) if layers else math.nan,
        settings=flatten(config or {}),
        notes=notes,
        parameters=sum(math.prod(t.shape) for t in tensors),
    )  # fmt: skip


def _map(name: str, rows: Sequence[Any], value: str, form: str) -> dict[str, Any] | None:
    grid = grid_of(rows, value)
    return None if grid is None else {"name": name, "grid": grid, "form": form}


def _charts(layers: Sequence[LayerDelta]) -> dict[str, Any]:
    """Mean over layers of what a rank keeps, and each module's norm through the blocks."""
    if not layers:
        return {"kept": "", "norms": ""}
    longest = max(len(x.singular_values) for x in layers)
    ranks = range(longest + 1)
    worst = [(float(k), 100 * max(x.error_at(k) for x in layers)) for k in ranks]
    mean = [(float(k), 100 * sum(x.error_at(k) for x in layers) / len(layers)) for k in ranks]
    kept = line_chart(
        [Series("worst layer", "eval", worst), Series("mean", "smooth", mean)],
        title="Error when the rank is cut", width=980, height=260, unit=" %", from_zero=True, x_name="rank",
    )  # fmt: skip
    curves = []
    value = "relative_norm" if math.isfinite(layers[0].relative_norm) else "delta_norm"
    for module in list(dict.fromkeys(x.module for x in layers))[:8]:
        points = [(float(x.block), getattr(x, value)) for x in layers if x.module == module and x.block is not None]
        curves.append(Series(module, "smooth", sorted(points)))
    norms = line_chart(curves, title=value, width=980, height=260, from_zero=True, x_name="block")
    return {"kept": kept, "norms": norms, "norm_name": value.replace("_", " ")}


def render_diff(title_a: str, title_b: str, found: Comparison, notes: Sequence[str] = ()) -> str:
    maps = [
        _map("cosine", found.layers, "cosine", "%.3f"),
        _map("overlap of output spaces", found.layers, "overlap_out", "%.3f"),
        _map("overlap of input spaces", found.layers, "overlap_in", "%.3f"),
        _map("distance", found.layers, "distance", "%.3f"),
    ]
    return page_environment().get_template("diff.html.j2").render(
        a=title_a, b=title_b, found=found, version=__version__, notes=notes, maps=[m for m in maps if m is not None]
    )  # fmt: skip


def write_page(text: str, path: str | Path) -> Path:
    """Write beside ``path`` and rename; return ``path``."""
    from ..files import write_text

    write_text(str(path), text)
    return Path(path)
