"""How a tuned model was asked in training, kept beside its adapter so that use asks it the same way."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.train.errors import BaseModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from veneer.train.data import Table

__all__ = ["FILE", "Asking", "asking_of", "read_asking", "write_asking"]

FILE = "asking.json"


@dataclass(frozen=True)
class Asking:
    """``chat``: through the chat template, or as plain text. ``system``: the system message of every row, if
    all rows have the same. ``single``: every row was one question and its answer.
    """

    chat: bool = True
    system: str | None = None
    single: bool = False


def asking_of(table: Table, as_chat: bool = False) -> Asking:
    """Read training rows of messages, prompts or texts for how they ask; ``as_chat``: prompts were asked as chats."""
    conversations = [turns for turns in _conversations(table) if turns is not None]
    if not conversations:
        return Asking(chat=as_chat and "prompt" in table.layout.columns, single=True)
    systems: set[str | None] = set()
    single = True
    for turns in conversations:
        first = turns[0]
        systems.add(first["content"] if first["role"] == "system" else None)
        single = single and sum(turn["role"] == "user" for turn in turns) == 1
    return Asking(chat=True, system=systems.pop() if len(systems) == 1 else None, single=single)


def _conversations(table: Table) -> Iterator[list[dict[str, str]] | None]:
    from veneer.train.pairs import are_messages, conversation

    if "chosen" in table.layout.columns:
        for row in table.dataset:
            chat = are_messages(row["chosen"]) or are_messages(row.get("prompt"))
            yield conversation(row, "chosen")[0] if chat else None
    elif "messages" in table.layout.columns:
        yield from table.dataset["messages"]


def write_asking(asking: Asking, folder: Path) -> None:
    """Write asking.json into an adapter's folder."""
    partial = folder / (FILE + ".partial")
    text = json.dumps(dataclasses.asdict(asking), ensure_ascii=False, indent=2)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, folder / FILE)


def read_asking(folder: Path | None) -> Asking:
    """What asking.json says; the chat template with no system message where there is none.

    Raises:
        BaseModelError: the file is not what `write_asking` writes.
    """
    if folder is None or not (folder / FILE).is_file():
        return Asking()
    path = folder / FILE
    hint = f"Remove it, or write {json.dumps(dataclasses.asdict(Asking()))}."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"not valid JSON: {error}", file=path, hint=hint) from None
    kinds = {"chat": bool, "system": str | None, "single": bool}
    good = isinstance(values, dict) and values.keys() <= kinds.keys()
    if not good or not all(isinstance(value, kinds[key]) for key, value in values.items()):
        raise BaseModelError("not what an adapter's asking.json holds", file=path, hint=hint)
    return Asking(**values)
