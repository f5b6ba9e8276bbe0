"""`veneer compare`: several runs side by side, in the terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from veneer.train.compare import Comparison, MetricLine
    from veneer.train.runs import Run

__all__ = ["compare"]

WIDTH = 22
"""Columns of the terminal for one run, and for the names of the rows."""


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `veneer train` wrote.")],
    html: Annotated[Path, typer.Option("--html", help="The page with the plots.")] = Path("compare.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and write no page.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Put several runs side by side: settings, scores, loss curves, time, memory, size."""
    if len(runs) < 2:
        hint = f"Give another run's folder too; {runs[0] / 'report.html'} is the page of this one."
        raise UserError("one run has nothing to be compared with", where=str(runs[0]), hint=hint)
    from rich.console import Console

    from veneer.inspection.page import write_page
    from veneer.train.compare import compare as put_side_by_side
    from veneer.train.compare import render_comparison
    from veneer.train.runs import read_runs

    found = put_side_by_side(read_runs(runs))
    if as_json:
        typer.echo(json.dumps(found.plain(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    show(console, found)
    console.print(f"page in {write_page(render_comparison(found), html)}", highlight=False, soft_wrap=True)


def show(console: Console, found: Comparison) -> None:
    """The table, in as many parts as the terminal's width asks for."""
    from rich.text import Text

    fit = max(1, (console.width - WIDTH) // WIDTH)
    for first in range(0, len(found.runs), fit):
        _part(console, found, range(first, min(first + fit, len(found.runs))))
    for note in found.notes:
        console.print(Text(note, style="yellow"))


def _part(console: Console, found: Comparison, which: range) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Runs", title_style="bold", title_justify="left")
    table.add_column("", overflow="fold")
    for i in which:
        table.add_column(Text(found.runs[i].name), overflow="fold")

    def rows(name: str, cell: Callable[[Run], str], end: bool = False) -> None:
        table.add_row(name, *(Text(cell(found.runs[i])) for i in which), end_section=end)

    rows("task", lambda run: run.task)
    rows("base", lambda run: run.base)
    rows("method", lambda run: run.method, end=True)
    settings = found.setting_rows()
    for n, (key, values) in enumerate(settings, 1):
        table.add_row(Text(key, style="dim"), *(Text(values[i]) for i in which), end_section=n == len(settings))
    for n, line in enumerate(found.metrics, 1):
        cells = [_score(line, i) for i in which]
        table.add_row(Text(line.name), *cells, end_section=n == len(found.metrics))
    for name, cell in costs():
        rows(name, cell)
    console.print(table)


def _score(line: MetricLine, run: int) -> Any:
    from rich.text import Text

    if line.after[run] is None:
        return Text("–", style="dim")
    before = f"{line.text(line.before[run])} → "
    return Text.assemble((before, "dim"), (line.text(line.after[run]), "bold green" if run in line.best else "bold"))


def costs() -> list[tuple[str, Callable[[Run], str]]]:
    """(name of the row, its text for a run)."""
    from veneer.cli.show import human_size
    from veneer.train.report import human_count, human_seconds

    def known(value: float | None, text: Callable[[float], str]) -> str:
        return "–" if value is None else text(value)

    def trained(run: Run) -> str:
        return f"{human_count(run.trainable_params)} ({100 * run.trainable_params / run.total_params:.2f} %)"

    return [
        ("training", lambda run: human_seconds(run.train_seconds)),
        ("tokens/s", lambda run: known(run.tokens_per_second, human_count)),
        ("peak memory", lambda run: known(run.peak_memory_mb, lambda mb: human_size(mb * 2**20))),
        ("trained parameters", trained),
        ("adapter", lambda run: known(run.adapter_bytes, human_size)),
    ]
