"""`veneer eval`: a trained adapter's scores on any labelled file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag
from veneer.cli.quiet import quiet_libraries
from veneer.cli.shared import BaseOption, ModelArgument, Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.train.tasks import Outcome

__all__ = ["evaluate"]


def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", "-d", help="Labelled rows, as in training.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the scores here, as JSON.")] = None,
    base: BaseOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Score the base without the adapter too.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 32,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only this many rows, from the first.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Rows to show with their answers.")] = 6,
    overrides: Overrides = None,
    debug: DebugFlag = False,
) -> None:
    """Score a trained adapter on labelled rows, with its task's own metrics."""
    from rich.console import Console

    from veneer.train.data import load_table
    from veneer.train.use import evaluate_on, load

    quiet_libraries()
    console = Console()
    loaded = load(model, base=base)
    flags = {"eval__batch_size": batch_size, "eval__limit": limit}
    recipe = loaded.recipe(data, overrides or [], **flags)
    table = load_table(recipe.data, "test", recipe.task)
    assert table is not None  # the recipe names it
    plan, tuned = evaluate_on(loaded, recipe, table)
    bare = None
    if compare and loaded.adapter is not None:
        with loaded.without_adapter():
            bare = loaded.task.evaluate(loaded.model, loaded.tokenizer, plan, recipe)
    show(console, plan.examples[:samples], tuned, bare)
    if out is not None:
        rows = len(plan.test) if plan.test is not None else 0
        scores = {"model": model, "task": recipe.task, "data": data, "rows": rows, "scores": tuned.metrics}
        write_json(out, scores | ({} if bare is None else {"base_scores": bare.metrics}))
        typer.echo(f"scores in {out}")


def show(console: Console, examples: list[tuple[str, str]], tuned: Outcome, bare: Outcome | None) -> None:
    """Some rows with the answers to them, and the scores."""
    from rich.table import Table
    from rich.text import Text

    from veneer.cli.show import answer, shorten, show_metrics
    from veneer.train.report import format_metric, readable

    table = Table(title="Examples", title_style="bold", show_lines=True, expand=True)
    for name in ("row", "expected", "answer"):
        table.add_column(name, ratio=1, overflow="fold")
    for (prompt, expected), got, right in zip(examples, tuned.outputs, tuned.correct):
        table.add_row(Text(shorten(prompt)), Text(shorten(expected)), answer(expected, got, right))
    if table.row_count:
        console.print(table)
    if bare is not None:
        show_metrics(console, bare.metrics, tuned.metrics)
        return
    scores = Table(title="Scores", title_style="bold")
    scores.add_column("metric")
    scores.add_column("value", justify="right")
    for name, value in tuned.metrics.items():
        scores.add_row(readable(name), format_metric(name, value))
    console.print(scores)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file beside its place and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
