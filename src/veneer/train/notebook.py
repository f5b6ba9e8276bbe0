"""A finished run as a cell of a notebook shows it: scores, answers, notes and where the files are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.train.result import RunResult

__all__ = ["as_html", "as_text"]

SAMPLES = 6
LONGEST = 300


def as_text(result: RunResult) -> str:
    """A few lines: what was trained, how long, the scores before and after, the folder."""
    from veneer.train.report import human_seconds, metric_rows

    head = f"{result.task}, {result.trainable_params:,} of {result.total_params:,} parameters"
    lines = [f"{head}, {result.train_tokens:,} tokens in {human_seconds(result.train_seconds)}"]
    rows = metric_rows(result.before, result.after)
    width = max((len(row.name) for row in rows), default=0)
    lines += [f"  {row.name:<{width}}  {row.before} -> {row.after}" for row in rows]
    return "\n".join([*lines, f"  {'adapter':<{width}}  {result.adapter_dir}"])


def as_html(result: RunResult) -> str:
    """The same as tables, with the first answers and the notes."""
    from veneer.train.report import metric_rows

    scores = [(row.name, row.before, row.after, row.change) for row in metric_rows(result.before, result.after)]
    mark = lambda ok, text: f"{'✓' if ok else '✗'} {text[:LONGEST]}"
    answers = [
        (s.prompt[:LONGEST], s.expected[:LONGEST], mark(s.base_ok, s.base), mark(s.tuned_ok, s.tuned))
        for s in result.samples[:SAMPLES]
    ]
    parts = [f"<p>{escape(as_text(result).splitlines()[0])}</p>"]
    if scores:
        parts.append(_table(("metric", "base", "tuned", "change"), scores))
    if answers:
        parts.append(_table(("prompt", "expected", "base", "tuned"), answers))
    parts += [f"<p>{escape(note)}</p>" for note in result.notes]
    return "\n".join([*parts, f"<p>Written to <code>{escape(result.out)}</code></p>"])


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line = lambda tag, cells: "".join(f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in cells)
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', names)}</tr></thead><tbody>{body}</tbody></table>"
