"""matplotlib figures of what an adapter learned, for papers and notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, MissingExtra
from .grid import grid_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .layers import LayerDelta

__all__ = ["heat_map", "spectra"]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("figures need matplotlib: pip install 'veneer[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def heat_map(rows: Sequence[Any], value: str = "relative_norm") -> Figure:
    """Modules by blocks, coloured by a field or property of the rows (LayerDelta or LayerDifference).

    Raises AdapterError where no row has a block or the value is known nowhere.
    """
    import numpy as np

    grid = grid_of(rows, value)
    if grid is None:
        raise AdapterError(f"no heat map of {value}: no layer lies in a numbered block, or the value is not known")
    table = np.array([[math.nan if c is None else c.value for c in row] for row in grid.cells], dtype=float)
    figure = _figure(2.5 + 0.35 * len(grid.blocks), 1.2 + 0.35 * len(grid.modules))
    axes = figure.add_subplot()
    image = axes.imshow(table.T, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(grid.modules)), grid.modules)
    axes.set_xticks(range(len(grid.blocks)), [str(b) for b in grid.blocks])
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label=value.replace("_", " "))
    return figure


def spectra(layers: Sequence[LayerDelta]) -> Figure:
    """Singular values of every layer's delta, each over its largest, one line a layer, coloured by module."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    modules = list(dict.fromkeys(layer.module for layer in layers))
    for layer in layers:
        top = max(layer.singular_values, default=0.0)
        if top > 0:
            colour = f"C{modules.index(layer.module) % 10}"
            x = range(1, len(layer.singular_values) + 1)
            axes.semilogy(x, [v / top for v in layer.singular_values], color=colour, alpha=0.5, linewidth=1)
    for i, module in enumerate(modules[:10]):
        axes.plot([], [], color=f"C{i % 10}", label=module)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value / largest")
    if modules:
        axes.legend(fontsize="small")
    return figure
