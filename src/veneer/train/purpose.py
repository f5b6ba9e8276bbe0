"""What an adapter was trained for, kept beside it as task.json, so that use needs to be told nothing again."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.errors import BaseModelError

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe
    from veneer.train.tasks import Plan

__all__ = ["FILE", "Purpose", "purpose_of", "read_purpose", "write_purpose"]

FILE = "task.json"


@dataclass(frozen=True)
class Purpose:
    """``task`` by its name in a recipe, ``options`` its own; ``data`` the recipe's columns and lengths, ``eval``
    how it is scored; ``model_options`` and ``facts`` what the rows said (see Plan).
    """

    task: str
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


#: where rows are and which of them: of the run, not of the adapter
_OF_THE_RUN = {"train", "test", "validation", "split", "format", "field", "stopping_strategy", "filter", "shuffle",
               "limit", "workers", "cache", "streaming", "shuffle_buffer"}  # fmt: skip


def purpose_of(recipe: Recipe, plan: Plan) -> Purpose:
    """The purpose of a run's adapter."""
    data = {key: value for key, value in recipe.data.model_dump(mode="json").items() if key not in _OF_THE_RUN}
    scored = recipe.eval.model_dump(mode="json", include={"metric", "max_new_tokens"})
    return Purpose(recipe.task, dict(recipe.options), data, scored, plan.model_options, plan.facts)


def write_purpose(purpose: Purpose, folder: Path) -> None:
    """Write task.json into an adapter's folder."""
    partial = folder / (FILE + ".partial")
    text = json.dumps(dataclasses.asdict(purpose), ensure_ascii=False, indent=2)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, folder / FILE)


def read_purpose(folder: Path | None) -> Purpose | None:
    """What task.json says, None where there is none.

    Raises:
        BaseModelError: the file is not what `write_purpose` writes.
    """
    from veneer.train.tasks import TASKS

    if folder is None or not (folder / FILE).is_file():
        return None
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"not valid JSON: {error}", file=path, hint="Train or copy the adapter again.") from None
    known = {item.name for item in dataclasses.fields(Purpose)}
    good = isinstance(values, dict) and values.keys() <= known and values.get("task") in TASKS
    if not good or not all(isinstance(value, dict) for key, value in values.items() if key != "task"):
        hint = f"It holds a `task` ({', '.join(TASKS)}) and what belongs to it."
        raise BaseModelError("not what an adapter's task.json holds", file=path, hint=hint)
    return Purpose(**values)
