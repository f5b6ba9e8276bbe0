"""Labels that `datasets` keeps as numbers, by their names."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["label_names", "names_in_schema", "with_names"]


def names_in_schema(schema: Any) -> dict[str, list[str]]:
    """The names of the columns' labels, where `datasets` wrote numbers and said what they mean."""
    held = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(held).get("info", {}).get("features", {}) if held else {}
    return label_names(features)


def label_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """Column -> names of its labels (alone or in lists), of a data set's features as plain values."""
    named = {}
    for column, kind in features.items():
        inner = kind[0] if isinstance(kind, list) else kind.get("feature", kind)
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            named[column] = list(inner["names"])
    return named


def with_names(row: dict[str, Any], named: dict[str, list[str]]) -> dict[str, Any]:
    """Labels by name; -1 is a test set's unknown one, and none."""
    name = lambda names, value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    for column, names in named.items():
        value = row[column]
        row[column] = [name(names, item) for item in value] if isinstance(value, list) else name(names, value)
    return row
