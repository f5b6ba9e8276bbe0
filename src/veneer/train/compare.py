"""Several runs side by side: what they were set to, what they scored, what they cost; compare.html draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.train.charts import Series, line_chart, smooth
from veneer.train.report import (
    column,
    differences,
    is_count,
    is_share,
    leaves,
    lower_is_better,
    page_environment,
    pretty_json,
    readable,
    setting_text,
)
from veneer.train.runs import Run
from veneer.version import __version__

__all__ = ["Comparison", "MetricLine", "compare", "render_comparison"]

COLOURS = 8
"""Colours in the page's style sheet; the ninth run begins anew with broken lines."""

UNCOMPARED = {"task", "base.name", "adapter.method", "out", "overwrite"}
"""Settings with a row of their own, and where a run was written."""

ROWS = ("data.test", "data.validation", "data.split", "eval.limit", "eval.metric", "eval.generate")
"""Settings that make two runs' scores scores of different things."""


@dataclass(frozen=True)
class MetricLine:
    """One metric of every run, None where a run has it not. ``share``: in [0, 1], to be read in per cent.

    ``best`` are the runs with the best value, empty where there is nothing to choose between.
    """

    name: str
    share: bool
    before: list[float | None]
    after: list[float | None]
    best: frozenset[int]

    def text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.share else f"{value:.4g}"

    def bars(self, run: int) -> tuple[float, float] | None:
        """Before and after as shares of the longest bar; None where a value cannot be drawn."""
        values = [v for v in (*self.before, *self.after) if v is not None]
        if not all(math.isfinite(v) and v >= 0 for v in values) or self.after[run] is None:
            return None
        top = 1.0 if self.share else max(values) or 1.0
        return (self.before[run] or 0.0) / top, (self.after[run] or 0.0) / top


@dataclass(frozen=True)
class Comparison:
    """``settings`` holds, by dotted key, the values that are not the same in every run (None: not set)."""

    runs: list[Run]
    settings: dict[str, list[Any]]
    metrics: list[MetricLine]
    notes: list[str]

    def setting_rows(self) -> list[tuple[str, list[str]]]:
        return [
            (key, ["–" if value is None else setting_text(value) for value in values])
            for key, values in self.settings.items()
        ]

    def plain(self) -> dict[str, Any]:
        """Everything as JSON has it; a number that is not finite becomes null."""
        runs = [
            {
                "name": run.name,
                "folder": str(run.folder),
                "task": run.task,
                "base": run.recipe["base"]["name"],
                "method": run.method,
                "before": {name: _finite(value) for name, value in run.before.items()},
                "after": {name: _finite(value) for name, value in run.after.items()},
                "train_seconds": run.train_seconds,
                "tokens_per_second": run.tokens_per_second,
                "peak_memory_mb": run.peak_memory_mb,
                "trainable_params": run.trainable_params,
                "total_params": run.total_params,
                "adapter_bytes": run.adapter_bytes,
                "machine": run.machine,
            }
            for run in self.runs
        ]
        return {"runs": runs, "settings_that_differ": self.settings, "notes": self.notes}


def compare(runs: Sequence[Run]) -> Comparison:
    """Put two or more runs side by side."""
    settings = _settings(runs)
    return Comparison(list(runs), settings, _metrics(runs), _notes(runs, settings))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    each = [{key: value for key, value in leaves(run.recipe) if value != []} for run in runs]
    keys = dict.fromkeys(key for found in each for key in found if key not in UNCOMPARED)
    rows = {key: [found.get(key) for found in each] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _metrics(runs: Sequence[Run]) -> list[MetricLine]:
    lines = []
    for name in dict.fromkeys(name for run in runs for name in run.after):
        before, after = ([_number(scores.get(name)) for scores in (r.before for r in runs)],
                         [_number(scores.get(name)) for scores in (r.after for r in runs)])  # fmt: skip
        values = [v for v in (*before, *after) if v is not None]
        if is_count(name) or not values:
            continue
        known = [v for v in after if v is not None and math.isfinite(v)]
        best: frozenset[int] = frozenset()
        if len(set(known)) > 1:
            top = min(known) if lower_is_better(name) else max(known)
            best = frozenset(i for i, v in enumerate(after) if v == top)
        lines.append(MetricLine(readable(name), is_share(name, *values), before, after, best))
    return lines


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _notes(runs: Sequence[Run], settings: dict[str, list[Any]]) -> list[str]:
    notes = []
    if len({run.task for run in runs}) > 1:
        notes.append("The runs are of different tasks: only scores of one name can be compared, and losses cannot.")
    rows = [key for key in ROWS if key in settings]
    if not rows and "data.split" not in settings and "seed" in settings and runs[0].recipe["data"].get("split"):
        rows = ["seed"]  # it draws the rows that are held out
    if rows:
        notes.append(f"The scores are not of the same test rows, or not made alike: {', '.join(rows)} differ.")
    for key in ("name", "device", "threads", "torch", "transformers", "veneer"):
        found = list(dict.fromkeys(str(run.machine.get(key)) for run in runs))
        if len(found) > 1:
            notes.append(f"Seconds, tokens per second and memory are of unlike machines: {key} is {', '.join(found)}.")
    bare = [run.name for run in runs if not run.history]
    if bare:
        notes.append(f"No log.jsonl, so no curve: {', '.join(bare)}.")
    return notes


def render_comparison(found: Comparison) -> str:
    """compare.html as text."""
    losses, held_out = [], []
    for i, run in enumerate(found.runs):
        points = column(run.history, "loss")
        smoothed = list(zip([x for x, _ in points], smooth([y for _, y in points])))
        losses.append(Series(run.name, css_of(i), smoothed))
        held_out.append(Series(run.name, css_of(i), column(run.history, "eval_loss")))
    wide: dict[str, Any] = {"width": 980, "height": 290}
    charts = [
        ("Training loss, smoothed", line_chart(losses, title="Training loss", **wide)),
        ("Held-out loss", line_chart(held_out, title="Held-out loss", **wide)),
    ]
    return page_environment().get_template("compare.html.j2").render(
        found=found,
        version=__version__,
        notes=found.notes,
        names=[run.name for run in found.runs],
        css=[css_of(i) for i in range(len(found.runs))],
        charts=[(name, chart) for name, chart in charts if chart],
        samples=_samples(found.runs),
    )  # fmt: skip


def css_of(run: int) -> str:
    """The classes of a run's line: its colour, and whether it is broken."""
    return f"run{run % COLOURS}" + (" broken" if run >= COLOURS else "")


def _samples(runs: Sequence[Run], limit: int = 6) -> list[dict[str, Any]]:
    """Test rows that every run answered, with the answer of each."""
    each = [{(s["prompt"], s["expected"]): s for s in run.samples} for run in runs]
    rows: list[dict[str, Any]] = []
    for prompt, expected in each[0]:
        if len(rows) < limit and all((prompt, expected) in found for found in each):
            wanted = pretty_json(expected)
            answers = [found[prompt, expected] for found in each]
            parts = [(a["tuned_ok"], differences(wanted, pretty_json(a["tuned"]))) for a in answers]
            rows.append({"prompt": prompt, "expected": wanted, "answers": parts})
    return rows
