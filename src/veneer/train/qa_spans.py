"""Extractive answers: windows over long contexts, the span a window marks, the best span of all windows."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Span", "Window", "answer_list", "best_span", "span_scores", "windows_of"]


@dataclass(frozen=True)
class Window:
    """A piece of one row: its number, its tokens, and the characters of the context behind each token.

    ``offsets`` are (first, last + 1), None for a token outside the context; ``none`` is the place that stands for
    "no answer here".
    """

    row: int
    input_ids: list[int]
    token_type_ids: list[int] | None
    offsets: list[tuple[int, int] | None]
    none: int

    def find(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last token of the characters [start, end), None where the window lacks some of them."""
        inside = [place for place, offset in enumerate(self.offsets) if offset is not None]
        first = next((p for p in inside if (self.offsets[p] or (0, 0))[1] > start), None)
        last = next((p for p in reversed(inside) if (self.offsets[p] or (0, 0))[0] < end), None)
        if first is None or last is None or first > last:
            return None
        covers = (self.offsets[inside[0]] or (0, 0))[0] <= start and (self.offsets[inside[-1]] or (0, 0))[1] >= end
        return (first, last) if covers else None


@dataclass(frozen=True)
class Span:
    """An answer: its text, the characters [start, end) of the context, and its score; no text where none is found."""

    text: str
    start: int
    end: int
    score: float


def windows_of(
    tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], limit: int, stride: int
) -> list[Window]:
    """Windows of at most ``limit`` tokens, each with the whole question, overlapping by ``stride`` tokens."""
    out = tokenizer(
        list(questions), list(contexts), truncation="only_second", max_length=limit, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    windows = []
    for number, ids in enumerate(out["input_ids"]):
        sides = out.sequence_ids(number)
        pairs = zip(out["offset_mapping"][number], sides, strict=True)
        offsets = [(int(a), int(b)) if side == 1 and b > a else None for (a, b), side in pairs]
        types = out["token_type_ids"][number] if "token_type_ids" in out else None
        cls = tokenizer.cls_token_id
        none = ids.index(cls) if cls in ids else 0
        windows.append(Window(out["overflow_to_sample_mapping"][number], ids, types, offsets, none))
    return windows


def best_span(
    windows: Sequence[Window], starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]], context: str,
    n_best: int, longest: int, null_threshold: float | None,
) -> Span:  # fmt: skip
    """The span with the highest start plus end score over a row's windows, at most ``longest`` tokens.

    With a ``null_threshold`` no answer is given where the least score of "none" in any window exceeds the best
    span's by more than it.
    """
    best, none = Span("", 0, 0, float("-inf")), float("inf")
    for window, start, end in zip(windows, starts, ends, strict=True):
        none = min(none, start[window.none] + end[window.none])
        inside = [place for place, offset in enumerate(window.offsets) if offset is not None]
        tops = [sorted(inside, key=lambda p: -scores[p])[:n_best] for scores in (start, end)]
        for first in tops[0]:
            for last in tops[1]:
                score = start[first] + end[last]
                if first <= last < first + longest and score > best.score:
                    a, b = (window.offsets[first] or (0, 0))[0], (window.offsets[last] or (0, 0))[1]
                    best = Span(context[a:b], a, b, score)
    if null_threshold is not None and none - best.score > null_threshold:
        return Span("", 0, 0, none)
    return best


def answer_list(value: Any, context: str) -> list[tuple[str, int]]:
    """The answers of a row as (text, first character), whichever of the usual forms they have.

    Forms: `{"text": [...], "answer_start": [...]}`, a list of `{"text", "answer_start"}`, one of these, or a text
    that stands in the context. An empty one means that the context does not answer.

    Raises:
        ValueError: none of these, or an answer that is not where it should be.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        if value not in context:
            raise ValueError(f"the answer {value!r} is not in the context")
        return [(value, context.index(value))]
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
        one = isinstance(texts, str)
        value = [
            {"text": t, "answer_start": s} for t, s in ([(texts, starts)] if one else zip(texts or [], starts or []))
        ]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("expected `text` and `answer_start`, or the answer as text")
    pairs = [(item.get("text"), item.get("answer_start", item.get("start"))) for item in value]
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int):
            raise ValueError("an answer needs a `text` and an `answer_start`")
        found = context[start : start + len(text)]
        if found != text:
            place = context.find(text)
            where = f"it is at {place}" if place >= 0 else "the context does not hold it"
            raise ValueError(f"the answer {text!r} is not at character {start} (there: {found!r}); {where}")
    return [(text, start) for text, start in pairs if text]


def _plain(text: str) -> str:
    lower = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lower).split())


def _overlap(want: str, got: str) -> float:
    wanted, found = _plain(want).split(), _plain(got).split()
    if not wanted or not found:
        return float(wanted == found)
    same = sum((Counter(wanted) & Counter(found)).values())
    return 2 * same / (len(wanted) + len(found))


def span_scores(expected: Sequence[Sequence[str]], answers: Sequence[str]) -> tuple[dict[str, float], list[bool]]:
    """Exact match and word F1 as SQuAD defines them (Rajpurkar et al. 2016): the best over a row's answers, case,
    punctuation and articles aside. A row without an answer expects an empty one.
    """
    wanted = [list(row) or [""] for row in expected]
    right = [any(_plain(w) == _plain(got) for w in want) for want, got in zip(wanted, answers, strict=True)]
    f1 = [max(_overlap(w, got) for w in want) for want, got in zip(wanted, answers, strict=True)]
    count = max(len(right), 1)
    return {"exact_match": sum(right) / count, "f1": sum(f1) / count}, right
