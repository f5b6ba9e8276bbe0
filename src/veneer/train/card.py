"""The model card: README.md in the adapter's folder, with what the run knows about itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from veneer.train.report import flatten, human_count, human_seconds, metric_rows
from veneer.train.tasks import task_class
from veneer.version import __version__

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe
    from veneer.train.result import RunResult

__all__ = ["LICENCES", "render_card", "write_card"]

#: licences of the bundled base models, by bundled name
LICENCES = {"smollm2-135m-instruct": "apache-2.0", "minilm-l6": "apache-2.0"}


def _front_matter(recipe: Recipe) -> str:
    fields = {
        "base_model": recipe.base.name,
        "library_name": "peft",
        "pipeline_tag": task_class(recipe.task).pipeline,
        "license": LICENCES.get(recipe.base.name.lower()),
        "tags": ["veneer", "peft", recipe.adapter.method],
    }
    known = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n"


def _cell(text: object) -> str:
    """Text for one line or one table cell of Markdown: no borders, no markup of its own."""
    flat = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
    return flat.replace("<", "&lt;").replace("`", "'")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _usage(recipe: Recipe) -> str:
    kind = task_class(recipe.task)
    predict = "--text 'some text'" if any(len(ask) == 1 for ask in kind.asks) else "--file rows.jsonl"
    command = "veneer chat ." if kind.writes else f"veneer predict . {predict}"
    return f"""In this folder:

```sh
{command}
```

```python
from veneer.train.use import load

loaded = load(".")
model, tokenizer = loaded.model, loaded.tokenizer
```

The files are in peft's format: `PeftModel.from_pretrained(base_model, ".")` reads them too."""


def _origins(result: RunResult) -> list[tuple[str, str]]:
    """The base and the data files, so that they can be told from others: file, size and SHA-256."""
    from veneer.base_mark import read_mark
    from veneer.files import SAFE_NAME, sha256
    from veneer.train.errors import DataError
    from veneer.train.sources import find_files

    rows = []
    tensors = Path(result.adapter_dir) / SAFE_NAME
    mark = read_mark(tensors) if tensors.is_file() else None
    if mark is not None:
        revision = f", revision {mark['revision']}" if mark["revision"] else ""
        rows.append(
            (f"base {result.recipe.base.name}{revision}", f"{mark['hash']} (of {len(mark['weights'])} weights)")
        )
    data = result.recipe.data
    named = [("training data", "train", name) for name in data.names]
    for what, split, name in [*named, *([("test data", "test", data.test)] if data.test else [])]:
        try:
            files = find_files(name, split)
        except DataError:
            files = ()  # it has moved since, or is on the hub
        rows += [(f"{what} {path.name}, {path.stat().st_size} bytes", f"sha256 {sha256(path)}") for path in files]
    return rows


def render_card(result: RunResult) -> str:
    """The card as Markdown with the hub's YAML header. An unknown licence is left for the user to state."""
    recipe = result.recipe
    metrics = [(row.name, row.before, row.after) for row in metric_rows(result.before, result.after)]
    shown = ("adapter", "train", "data", "seed")
    settings = flatten({k: v for k, v in recipe.model_dump(mode="json").items() if k in shown})
    share = 100 * result.trainable_params / result.total_params
    parts = [
        _front_matter(recipe),
        f"# {recipe.base.name.rstrip('/').rsplit('/', 1)[-1]}: {recipe.adapter.method} adapter\n",
        f"A {recipe.adapter.method} adapter for {_cell(recipe.base.name)} ({recipe.task}), trained on "
        f"{_cell(', '.join(recipe.data.names))} with veneer {__version__}: {human_count(result.trainable_params)} "
        f"trained parameters, {share:.2f} % of the whole; {human_count(result.train_tokens)} tokens in "
        f"{human_seconds(result.train_seconds)}.\n",
        "## Use\n",
        _usage(recipe) + "\n",
    ]
    if metrics:
        parts += ["## Held-out scores\n", _table(("metric", "base", "tuned"), metrics) + "\n"]
    parts += ["## Settings\n", _table(("setting", "value"), settings) + "\n"]
    origins = _origins(result)
    if origins:
        parts += ["## Where it comes from\n", _table(("what", "fingerprint"), origins) + "\n"]
    if recipe.base.name.lower() not in LICENCES:
        parts += ["## Licence\n", "The base model's licence applies to it. State this adapter's own here.\n"]
    return "\n".join(parts)


def write_card(result: RunResult, path: str | Path) -> Path:
    """Write the card beside ``path`` and rename it into place; return ``path``."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_card(result), encoding="utf-8")
    os.replace(partial, path)
    return path
