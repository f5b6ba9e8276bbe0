"""Scores of answers against what was expected: exact match, JSON fields, entities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from veneer.train.errors import RecipeError
from veneer.train.schemes import as_iobes

__all__ = [
    "answers_are_json",
    "entity_scores",
    "exact_scores",
    "json_scores",
    "need_seqeval",
    "spans",
]


def _parse(text: str) -> Any:
    """A JSON value, or None where the text is none (a bare `null` counts as none too)."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def answers_are_json(answers: Sequence[str]) -> bool:
    """Whether every answer is a JSON object or list."""
    return bool(answers) and all(isinstance(_parse(answer), (dict, list)) for answer in answers)


Path = tuple[str | int, ...]


def _leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    """The plain values in a JSON value by path; an empty object or list is a value of its own."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    leaves = {key: leaf for name, item in items for key, leaf in _leaves(item, (*path, name)).items()}
    return leaves or {path: value}


def _same(left: Any, right: Any) -> bool:
    # Python holds True equal to 1; JSON does not
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def json_scores(expected: Sequence[str], answers: Sequence[str]) -> tuple[dict[str, float], list[bool]]:
    """Scores of JSON answers, each a share of 0 to 1, and whether each answer is right.

    `exact_match`: the same value, whatever the spacing and the order of keys. `field_accuracy`: right plain
    values over all that either side holds, so that a missing field and an invented one both cost.
    `valid_json`: answers that parse.
    """
    right, fields_right, fields_all, valid = [], 0, 0, 0
    for want_text, got_text in zip(expected, answers, strict=True):
        want, got = _leaves(_parse(want_text)), _parse(got_text)
        have = {} if got is None else _leaves(got)
        hits = sum(1 for key, value in want.items() if key in have and _same(value, have[key]))
        valid += got is not None
        fields_right += hits
        fields_all += len(want.keys() | have.keys())
        right.append(hits == len(want) == len(have))
    count = max(len(right), 1)
    scores = {
        "exact_match": sum(right) / count,
        "field_accuracy": fields_right / max(fields_all, 1),
        "valid_json": valid / count,
    }
    return scores, right


def exact_scores(expected: Sequence[str], answers: Sequence[str]) -> tuple[dict[str, float], list[bool]]:
    """The share of answers equal to what was expected, white space at both ends aside."""
    right = [want.strip() == got.strip() for want, got in zip(expected, answers, strict=True)]
    return {"exact_match": sum(right) / max(len(right), 1)}, right


def need_seqeval() -> None:
    """Raise a RecipeError with the way out where seqeval is not installed."""
    import importlib.util

    if importlib.util.find_spec("seqeval") is None:
        hint = "Run `pip install seqeval`, or set `eval.metric: accuracy`."
        raise RecipeError("entity scores need the seqeval package", key="eval.metric", hint=hint)


def entity_scores(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Entity-level precision, recall and F1 (seqeval, micro average) and word accuracy, each 0 to 1.

    In any of the schemes of schemes.py; labels that break theirs are read as conlleval reads them.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    want, got = [as_iobes(row) for row in expected], [as_iobes(row) for row in found]
    return {
        "f1": float(f1_score(want, got, zero_division=0)),
        "precision": float(precision_score(want, got, zero_division=0)),
        "recall": float(recall_score(want, got, zero_division=0)),
        "accuracy": accuracy(want, got),
    }


def accuracy(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """The share of words with the right label."""
    pairs = [(a, b) for want, got in zip(expected, found, strict=True) for a, b in zip(want, got, strict=True)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def spans(words: Sequence[str], tags: Sequence[str]) -> str:
    """A tagged sentence as `type: words` parts, for people to read; `-` where nothing is tagged."""
    parts: list[tuple[str, list[str]]] = []
    closed = True
    for word, tag in zip(words, as_iobes(tags), strict=True):
        mark, _, kind = tag.partition("-")
        kind = kind or tag
        if tag != "O":
            if mark in {"I", "E"} and not closed and parts[-1][0] == kind:
                parts[-1][1].append(word)
            else:
                parts.append((kind, [word]))
        closed = tag == "O" or mark in {"E", "S"}
    return "; ".join(f"{kind}: {' '.join(text)}" for kind, text in parts) or "-"
