"""Columns inside columns: `translation.en` is `en` in the object that a row has in `translation`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.train.errors import DataError, nearest

__all__ = ["COLUMN", "column_names", "direction_of", "languages", "leaves", "named_column", "schema_names", "value_at"]

#: where translation sets keep a text in each of their languages
COLUMN = "translation"
#: the languages of T5's prefixes, and some more
_CODES = {"english": "en", "german": "de", "french": "fr", "romanian": "ro", "spanish": "es", "italian": "it",
          "portuguese": "pt", "dutch": "nl", "polish": "pl", "czech": "cs", "russian": "ru", "ukrainian": "uk",
          "swedish": "sv", "danish": "da", "norwegian": "no", "finnish": "fi", "estonian": "et", "latvian": "lv",
          "lithuanian": "lt", "hungarian": "hu", "greek": "el", "turkish": "tr", "arabic": "ar", "hebrew": "he",
          "hindi": "hi", "japanese": "ja", "korean": "ko", "chinese": "zh", "vietnamese": "vi"}  # fmt: skip


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, which may be inside another; None where there is none."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return value_at(inner, rest) if rest and isinstance(inner, Mapping) else None


def column_names(row: Mapping[str, Any]) -> list[str]:
    """The names of a row's columns, those inside an object too, right after it."""
    names: list[str] = []
    for name, value in row.items():
        names += [name, *(f"{name}.{inner}" for inner in (column_names(value) if isinstance(value, Mapping) else ()))]
    return names


def schema_names(fields: Any) -> list[str]:
    """As `column_names`, from the fields of an Arrow schema or struct."""
    import pyarrow

    names: list[str] = []
    for field in fields:
        inner = schema_names(field.type) if pyarrow.types.is_struct(field.type) else ()
        names += [field.name, *(f"{field.name}.{name}" for name in inner)]
    return names


def leaves(have: Sequence[str]) -> list[str]:
    """The columns that hold no others."""
    return [name for name in have if not any(other.startswith(f"{name}.") for other in have)]


def named_column(column: str, have: Sequence[str]) -> str:
    """The column that a recipe means: itself, or the one inside another that ends with it."""
    inside = [name for name in have if name.endswith(f".{column}")]
    return inside[0] if column not in have and len(inside) == 1 else column


def direction_of(base: str, prefix: str) -> tuple[str, str] | None:
    """(source, target) language, where a prefix (`translate English to German: `) or a base's name (`opus-mt-en-de`)
    says them."""
    said = re.fullmatch(r"\s*translate (?:from )?(\w+) (?:in)?to (\w+)\W*", prefix, re.IGNORECASE)
    if said:
        first, last = (_CODES.get(word.lower(), word.lower()) for word in said.groups())
        return first, last
    ends = re.search(r"[-_/]([a-z]{2,3})[-_]([a-z]{2,3})$", base)
    return (ends[1], ends[2]) if ends else None


def languages(
    named: Mapping[str, str], have: Sequence[str], said: tuple[str, str] | None, asks: bool = False
) -> dict[str, str]:
    """`source` and `target` in the `translation` column: as ``named`` or ``said``; named one, two languages leave the
    other. Empty where there is no such column, or nothing is left to find. With ``asks`` the source is enough.

    Raises:
        DataError: which language is the source cannot be told.
    """
    held = [name.removeprefix(f"{COLUMN}.") for name in have if name.startswith(f"{COLUMN}.")]
    if not held or ({"source"} if asks else {"source", "target"}) <= named.keys():
        return {}
    if asks and (len(held) == 1 or (said is not None and said[0] in held)):
        source = held[0] if len(held) == 1 or said is None else said[0]
        return {"source": f"{COLUMN}.{source}"}
    known = {role: name.removeprefix(f"{COLUMN}.") for role, name in named.items()}
    rest = [name for name in held if name not in known.values()]
    if not known and said is not None and set(said) <= set(held):
        known = dict(zip(("source", "target"), said, strict=True))
    elif len(known) == 1 and len(rest) == 1:
        known = {"source": rest[0], "target": rest[0], **known}
    else:
        wrong = next((code for code in said or () if code not in held), None)
        problem = f"the column {COLUMN!r} holds {', '.join(held)}, and nothing says which is to become which"
        if wrong is not None:
            problem = (
                f"the column {COLUMN!r} holds {', '.join(held)}, and the base or its prefix says {'-'.join(said or ())}"
            )
        example = f"{{source: {held[0]}, target: {held[-1]}}}"
        near = None if wrong is None else nearest(wrong, held)
        raise DataError(
            problem, key="data.columns", near=near, hint=f"Say it, for example `data: {{columns: {example}}}`."
        )
    return {role: f"{COLUMN}.{name}" for role, name in known.items()}
