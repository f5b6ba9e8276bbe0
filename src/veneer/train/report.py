"""report.html: one self-contained page about a training run.

Everything is inline (style, script, charts as SVG) and the page's own content policy forbids loading
anything else, so it reads the same from a mail attachment or a machine with no network.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.charts import Series, line_chart, smooth, sparkline
from veneer.version import __version__

if TYPE_CHECKING:
    from veneer.inspection import LayerDelta
    from veneer.train.recipe import Recipe
    from veneer.train.result import RunResult

__all__ = ["MetricRow", "Segment", "differences", "metric_rows", "page_environment", "render_report", "write_report"]


@dataclass(frozen=True)
class Segment:
    """A piece of a model's answer; ``changed`` when it is not part of the expected answer."""

    text: str
    changed: bool


@dataclass(frozen=True)
class MetricRow:
    """One metric before and after. ``share`` values lie in [0, 1] and read as percentages."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None
    share: tuple[float, float] | None


def pretty_json(text: str) -> str:
    """The text re-indented if it is a JSON object or array, else as it stands."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return json.dumps(value, indent=2, ensure_ascii=False) if isinstance(value, dict | list) else text


def differences(expected: str, got: str) -> list[Segment]:
    """Cut ``got`` into pieces that match ``expected``, word by word, and pieces that do not."""
    split = re.compile(r"\w+|\s+|[^\w\s]")
    want, have = split.findall(expected), split.findall(got)
    segments: list[Segment] = []
    matcher = difflib.SequenceMatcher(None, want, have, autojunk=False)
    for op, _, _, start, stop in matcher.get_opcodes():
        text = "".join(have[start:stop])
        if text:
            segments.append(Segment(text, op != "equal" and bool(text.strip())))
    return segments


def readable(name: str) -> str:
    """A metric's key as words: ``eval_exact_match`` -> ``exact match``."""
    return name.removeprefix("eval_").replace("_", " ").strip()


def lower_is_better(name: str) -> bool:
    return bool(re.search(r"loss|perplexity|error", name))


def is_share(name: str, *values: float) -> bool:
    """Whether a metric is a fraction of a whole, to be shown in per cent."""
    if re.search(r"margin|reward", name) and "accuracy" not in name:
        return False
    rounding = 1e-9
    return not lower_is_better(name) and all(0 <= v <= 1 + rounding for v in values) and not is_count(name)


def is_count(name: str) -> bool:
    return bool(re.search(r"(^|_)(n|count|support|examples|samples|tokens)$", name))


def format_metric(name: str, value: float) -> str:
    """``0.913`` of a fraction -> ``91.3 %``; a loss -> ``0.1234``; a count -> ``120``."""
    if is_share(name, value):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if is_count(name) else f"{value:.4g}"


def metric_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[MetricRow]:
    """Pair up the numbers that both runs have; counts that did not change are left out."""
    rows = []
    for name, new in after.items():
        old = before.get(name)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new)):
            continue
        assert old is not None
        if is_count(name):
            continue
        share = (float(old), float(new)) if is_share(name, old, new) else None
        gain = new - old
        change = f"{100 * gain:+.1f} points" if share else f"{gain:+.4g}"
        better = None if gain == 0 else (gain < 0) == lower_is_better(name)
        rows.append(
            MetricRow(readable(name), format_metric(name, old), format_metric(name, new), change, better, share)
        )
    return rows


def human_seconds(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_count(number: float) -> str:
    """``134515008`` -> ``134.5 M``; below a hundred thousand in full, ``1804`` -> ``1,804``."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if abs(number) >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} k" if abs(number) >= 1e5 else f"{number:,.0f}"


def column(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every log line that has ``key`` as a finite number."""
    return [
        (float(row["step"]), float(row[key]))
        for row in history
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]


def _charts(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    loss = column(history, "loss")
    smoothed = list(zip([x for x, _ in loss], smooth([y for _, y in loss])))
    curves = [Series("loss", "raw", loss), Series("smoothed", "smooth", smoothed)]
    held_out = column(history, "eval_loss")
    if held_out:
        curves.append(Series("held-out", "eval", held_out))
    rate, speed, memory = (column(history, k) for k in ("learning_rate", "tokens_per_second", "peak_memory_mb"))
    single = [Series("tokens/s", "smooth", speed)]
    return {
        "loss": line_chart(curves, title="Training loss", width=980, height=290),
        "has_eval": bool(held_out),
        "learning_rate": line_chart([Series("learning rate", "smooth", rate)], title="Learning rate", from_zero=True),
        "speed": line_chart(single, title="Tokens per second", from_zero=True),
        "memory": line_chart(
            [Series("peak memory", "smooth", memory)], title="Peak memory", unit=" MB", from_zero=True
        ),
    }


def _heat_map(layers: Sequence[LayerDelta]) -> dict[str, Any] | None:
    """Rows are blocks, columns the modules inside them; each cell has the layer and its two shades."""
    placed = [layer for layer in layers if layer.block is not None]
    if not placed:
        return None
    modules = list(dict.fromkeys(layer.module for layer in placed))
    blocks = sorted({layer.block for layer in placed if layer.block is not None})
    if len(blocks) * len(modules) > 4 * len(placed):
        return None  # names that do not form a grid would make a map of holes
    top_norm = max(layer.relative_norm for layer in placed) or 1.0
    top_rank = max(layer.effective_rank for layer in placed) or 1.0
    at = {(layer.block, layer.module): layer for layer in placed}
    rows = []
    for block in blocks:
        cells: list[dict[str, Any] | None] = []
        for module in modules:
            layer = at.get((block, module))
            cells.append(
                None
                if layer is None
                else {
                    "layer": layer,
                    "norm": layer.relative_norm / top_norm,
                    "rank": layer.effective_rank / top_rank,
                }
            )
        rows.append({"block": block, "cells": cells})
    return {"modules": modules, "rows": rows, "top_norm": top_norm, "top_rank": top_rank}


def leaves(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted key, value) pairs; unset ones are left out."""
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += leaves(item, f"{prefix}{key}.")
        elif item is not None:
            rows.append((prefix + key, item))
    return rows


def setting_text(value: Any) -> str:
    """A setting as it reads in a table."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.lower() if isinstance(value, bool) else text


def flatten(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) pairs; unset ones are left out."""
    return [(key, setting_text(item)) for key, item in leaves(value)]


def _samples(result: RunResult) -> list[dict[str, Any]]:
    rows = []
    for sample in result.samples:
        expected = pretty_json(sample.expected)
        rows.append(
            {
                "prompt": sample.prompt,
                "expected": expected,
                "answers": [
                    {"who": who, "ok": ok, "parts": differences(expected, pretty_json(text))}
                    for who, ok, text in (
                        ("base", sample.base_ok, sample.base),
                        ("tuned", sample.tuned_ok, sample.tuned),
                    )
                ],
            }
        )
    return rows


def _answers_over_time(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each sampled row the answers that evaluation got during training, the earliest first."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in history:
        for sample in line.get("samples", ()):
            wanted = pretty_json(sample["expected"])
            parts = differences(wanted, pretty_json(sample["answer"]))
            answer = {"step": line["step"], "ok": sample["ok"], "parts": parts}
            rows.setdefault((sample["prompt"], wanted), []).append(answer)
    return [{"prompt": prompt, "expected": wanted, "answers": found} for (prompt, wanted), found in rows.items()]


def page_environment() -> Any:
    """jinja2 with the templates of every page, and the filters that they use."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=ChoiceLoader([PackageLoader("veneer.train"), PackageLoader("veneer.inspection")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = lambda value: value is not None and math.isfinite(value)
    made.filters.update(seconds=human_seconds, count=human_count, spark=sparkline, known=known)
    return made


def render_report(result: RunResult, layers: Sequence[LayerDelta] = ()) -> str:
    """The page as text. ``layers`` comes from :func:`veneer.inspection.inspect_adapter`; it may be empty."""
    metrics = metric_rows(result.before, result.after)
    peak = max((m for _, m in column(result.history, "peak_memory_mb")), default=None)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            title=title_of(result.recipe),
            result=result,
            version=__version__,
            metrics=metrics,
            folder=Path(result.out).name,
            headlines=sorted(metrics, key=lambda row: row.share is None)[:2],
            speed=result.train_tokens / result.train_seconds if result.train_seconds > 0 else 0.0,
            peak_memory=peak,
            charts=_charts(result.history),
            samples=_samples(result),
            over_time=_answers_over_time(result.history),
            settings=flatten(result.recipe.model_dump(mode="json")),
            machine=flatten(result.machine),
            layers=layers,
            heat=_heat_map(layers),
        )
    )


def title_of(recipe: Recipe) -> str:
    """``<base> + <method>``, by the last part of the base's name."""
    return f"{recipe.base.name.rstrip('/').rsplit('/', 1)[-1]} + {recipe.adapter.method}"


def write_report(result: RunResult, path: str | Path, layers: Sequence[LayerDelta] = ()) -> Path:
    """Write the page beside ``path`` and rename it into place; return ``path``."""
    path = Path(path)
    text = render_report(result, layers)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
