"""Results in the terminal: examples side by side, metrics before and after, files, next commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.highlighter import JSONHighlighter
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.train.result import Sample

__all__ = ["human_size", "show_files", "show_metrics", "show_next", "show_samples"]

LONGEST = 420
"""Characters of an answer shown in the terminal; the report has it whole."""


def shorten(text: str, limit: int = LONGEST) -> str:
    """The text, cut at ``limit`` characters with a mark that it was."""
    text = text.strip()
    return text if len(text) <= limit else text[:limit].rstrip() + " …"


def spaced(text: str) -> str:
    """JSON with a space after each comma and colon, where a narrow column can break it; other text as is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else text


def answer(expected: str, got: str, ok: bool) -> Text:
    """An answer as a table cell: a right one in JSON colours, a wrong one with its differences in red."""
    from veneer.train.report import differences

    expected, got = spaced(expected), spaced(got)
    text = Text("✓ " if ok else "✗ ", style="bold green" if ok else "bold red")
    if ok:
        body = Text(shorten(got), style="not bold default")
        JSONHighlighter().highlight(body)
        return text.append_text(body)
    for part in differences(expected, shorten(got)):
        text.append(part.text, style="not bold red" if part.changed else "not bold default")
    if not got.strip():
        text.append("(nothing)", style="not bold dim")
    return text


def show_samples(console: Console, samples: Sequence[Sample], limit: int = 6) -> None:
    """Held-out prompts with the base's and the tuned model's answers."""
    if not samples:
        return
    table = Table(title="Held-out examples", title_style="bold", show_lines=True, expand=True)
    for name in ("prompt", "base", "tuned"):
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples[:limit]:
        tuned = answer(sample.expected, sample.tuned, sample.tuned_ok)
        if not sample.tuned_ok:
            tuned.append("\nexpected ", style="bold not red").append(
                shorten(spaced(sample.expected)), style="not bold green"
            )
        table.add_row(Text(shorten(sample.prompt)), answer(sample.expected, sample.base, sample.base_ok), tuned)
    console.print(table)


def show_metrics(console: Console, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """One line per metric: base, tuned, change."""
    from veneer.train.report import metric_rows

    rows = metric_rows(before, after)
    if not rows:
        return
    table = Table(title="Held-out scores", title_style="bold")
    table.add_column("metric")
    for name in ("base", "tuned", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        style = "green" if row.better else ("red" if row.better is not None else "dim")
        table.add_row(row.name, row.before, Text(row.after, style="bold"), Text(row.change, style=style))
    console.print(table)


def human_size(size: float) -> str:
    """``1536`` -> ``1.5 KB``."""
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"


def show_files(console: Console, out: Path) -> None:
    """Every file of the run with its size."""
    console.print(f"\n[bold]Written to[/bold] {out}", highlight=False)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        size = human_size(path.stat().st_size)
        console.print(Text(f"  {path.relative_to(out)!s:<44} {size:>9}"), soft_wrap=True)


def show_next(console: Console, commands: Sequence[tuple[str, str]]) -> None:
    """Commands to try next. Not wrapped, so that they can be copied as they stand."""
    console.print("\n[bold]Try next[/bold]")
    for purpose, command in commands:
        console.print(Text(f"  # {purpose}", style="dim"), soft_wrap=True)
        console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)
