"""`veneer inspect` and `veneer diff`: what an adapter learned, and how two adapters differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.shared import BaseOption

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.inspection import LayerDelta

__all__ = ["diff", "inspect"]

SHOWN = 24
"""Layers in the terminal's table; the page and the tables have them all."""

Page = Annotated[Path | None, typer.Option("--html", help="Write a self-contained page.")]
TableFile = Annotated[Path | None, typer.Option("--table", help="Write every layer as .csv, .json or .parquet.")]
All = Annotated[bool, typer.Option("--all", help="Show every layer.")]


def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a run's folder, or a hub id.")],
    base: BaseOption = None,
    html: Page = None,
    table: TableFile = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write A, B and delta of every layer as .npz or .safetensors.")
    ] = None,
    error: Annotated[float, typer.Option("--error", min=0.0, max=1.0, help="Error allowed when ranks are cut.")] = 0.1,
    everything: All = False,
    debug: DebugFlag = False,
) -> None:
    """Show what an adapter learned: norms, effective ranks, ranks that can go, layers that learned nothing."""
    from rich.console import Console

    from veneer import state
    from veneer.cli.quiet import quiet_libraries
    from veneer.inspection import inspect_adapter, inspect_tensors
    from veneer.opened import adapter_folder, open_adapter

    quiet_libraries()
    console = Console()
    tensors = inspect_tensors(state.read(str(adapter_folder(adapter)))[0])
    opened = open_adapter(adapter, base)
    layers = inspect_adapter(opened.model)
    _show_layers(console, layers, error, everything)
    if not layers:
        _show_tensors(console, tensors)
    if opened.note:
        console.print(opened.note, style="dim", highlight=False)
    if export is not None:
        from veneer.export.matrices import export_matrices

        console.print(f"matrices in {export_matrices(opened.model, export)}", highlight=False)
    if table is not None:
        from veneer.inspection.frames import write_frame

        console.print(f"table in {write_frame(layers or tensors, table)}", highlight=False)
    if html is not None:
        from veneer.inspection.page import render_inspection, write_page

        notes = [opened.note] if opened.note else []
        settings = opened.config.to_dict()
        page = render_inspection(
            _title(opened), layers, tensors, config=_plain(settings), error=error, notes=notes
        )  # fmt: skip
        console.print(f"page in {write_page(page, html)}", highlight=False)


def _title(opened: Any) -> str:
    kind = str(getattr(opened.config.peft_type, "value", opened.config.peft_type)).lower()
    return f"{opened.folder.resolve().name}: {kind}" + (f" on {opened.base_name}" if opened.base_name else "")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: sorted(map(str, v)) if isinstance(v, set) else v for k, v in settings.items()}


def _number(value: float | None, form: str) -> str:
    return "" if value is None or value != value else format(value, form)


def _show_layers(console: Console, layers: list[LayerDelta], error: float, everything: bool) -> None:
    from rich.table import Table

    if not layers:
        return
    _show_map(console, layers)
    rows = layers if everything or len(layers) <= SHOWN else sorted(layers, key=lambda x: -x.delta_norm)[:SHOWN]
    title = "Layers" if len(rows) == len(layers) else f"The {SHOWN} layers that changed most, of {len(layers)}"
    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("shape", "r", "|A|", "|B|", "|Δ|", "|Δ|/|W|", "eff. rank", f"rank at {error:.0%}"):
        table.add_column(name, justify="right", no_wrap=True)
    for x in rows:
        table.add_row(
            x.name, f"{x.shape[0]}x{x.shape[1]}", str(x.r), _number(x.a_norm, ".3g"), _number(x.b_norm, ".3g"),
            f"{x.delta_norm:.3g}", _number(x.relative_norm, ".4f"), f"{x.effective_rank:.1f}", str(x.rank_for(error)),
            style="red" if x.learned_nothing else "",
        )  # fmt: skip
    console.print(table)
    need, now = sum(x.rank_for(error) for x in layers), sum(min(x.r, len(x.singular_values)) for x in layers)
    share = f" ({need / now:.0%})" if now else ""
    console.print(f"For an error of {error:.0%} on every layer, {need} of {now} ranks{share}.", highlight=False)
    idle = [x.name for x in layers if x.learned_nothing]
    if idle:
        more = f" and {len(idle) - 8} more" if len(idle) > 8 else ""
        console.print(f"[red]{len(idle)} layers learned nothing:[/red] {', '.join(idle[:8])}{more}", highlight=False)


def _show_map(console: Console, layers: list[LayerDelta]) -> None:
    """Blocks from left to right, one line a module; a darker mark is a larger change."""
    from veneer.inspection.grid import grid_of

    grid = grid_of(layers, "relative_norm") or grid_of(layers, "delta_norm")
    if grid is None or len(grid.blocks) < 2:
        return
    width = max(map(len, grid.modules))
    console.print("Change by block and module, from none (·) to the largest (█)", style="bold", highlight=False)
    for j, module in enumerate(grid.modules):
        marks = "".join(_mark(None if row[j] is None else row[j].shade) for row in grid.cells)  # type: ignore[union-attr]
        console.print(f"  {module:<{width}}  {marks}", highlight=False, markup=False)
    ends = f"{grid.blocks[0]} to {grid.blocks[-1]}"
    console.print(f"  {'block':<{width}}  {ends}\n", style="dim", highlight=False)


def _mark(shade: float | None) -> str:
    if shade is None:
        return " "
    return "·" if shade == 0 else "▁▂▃▄▅▆▇█"[min(int(shade * 8), 7)]


def _show_tensors(console: Console, tensors: list[Any]) -> None:
    from rich.table import Table

    table = Table(title="Tensors", title_style="bold", title_justify="left")
    for name in ("tensor", "shape", "type", "norm"):
        table.add_column(name, overflow="fold")
    for t in tensors:
        table.add_row(t.name, "x".join(map(str, t.shape)), t.dtype, f"{t.norm:.4g}", style="red" if t.zero else "")
    console.print(table)


def diff(
    first: Annotated[str, typer.Argument(help="An adapter's folder or hub id.")],
    second: Annotated[str, typer.Argument(help="Another adapter of the same base.")],
    base: BaseOption = None,
    html: Page = None,
    table: TableFile = None,
    everything: All = False,
    debug: DebugFlag = False,
) -> None:
    """Compare two adapters: cosine of their changes and overlap of the directions they use, layer by layer."""
    from rich.console import Console
    from rich.table import Table

    from veneer.cli.quiet import quiet_libraries
    from veneer.inspection import compare_adapters
    from veneer.opened import open_adapter

    quiet_libraries()
    console = Console()
    one, two = open_adapter(first, base), open_adapter(second, base)
    found = compare_adapters(one.model, two.model)
    if not found.layers and not found.skipped:
        raise UserError("the adapters have no layer in common", where=f"{first}, {second}", hint="Are the bases one?")
    rows = found.layers if everything else sorted(found.layers, key=lambda d: -max(d.norm_a, d.norm_b))[:SHOWN]
    shown = Table(title=f"{len(rows)} of {len(found.layers)} layers", title_style="bold", title_justify="left")
    shown.add_column("layer", overflow="fold")
    for name in ("|Δ1|", "|Δ2|", "cosine", "distance", "ranks", "out overlap", "in overlap"):
        shown.add_column(name, justify="right", no_wrap=True)
    for d in rows:
        shown.add_row(
            d.name, f"{d.norm_a:.3g}", f"{d.norm_b:.3g}", _number(d.cosine, ".3f"), f"{d.distance:.3f}",
            f"{d.rank_a}, {d.rank_b}", _number(d.overlap_out, ".3f"), _number(d.overlap_in, ".3f"),
        )  # fmt: skip
    console.print(shown)
    console.print(f"cosine of all changes together: {_number(found.cosine, '.4f') or 'none'}", highlight=False)
    for label, names in (("only in the first", found.only_a), ("only in the second", found.only_b)):
        if names:
            console.print(f"{len(names)} layers {label}: {', '.join(names[:6])}", highlight=False)
    if table is not None:
        from veneer.inspection.frames import write_frame

        console.print(f"table in {write_frame(found.layers, table)}", highlight=False)
    if html is not None:
        from veneer.inspection.page import render_diff, write_page

        page = render_diff(_title(one), _title(two), found, [n for n in {one.note, two.note} if n])
        console.print(f"page in {write_page(page, html)}", highlight=False)
