"""Entities in plain text from a token-classification model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["entities", "spans"]


def spans(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first word, last word + 1, type) of each entity in BIO labels; an I- after nothing begins one."""
    found: list[tuple[int, int, str]] = []
    for i, label in enumerate(labels):
        prefix, _, kind = label.partition("-")
        if not kind:
            prefix, kind = ("O", "") if label == "O" else ("I", label)
        if prefix == "O":
            continue
        if prefix == "I" and found and found[-1][1] == i and found[-1][2] == kind:
            found[-1] = (found[-1][0], i + 1, kind)
        else:
            found.append((i, i + 1, kind))
    return found


def entities(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 8) -> Iterator[list[dict[str, Any]]]:
    """For each text its entities as ``{"text", "label", "start", "end"}``, offsets in characters.

    A text is cut into words and single punctuation marks; a word takes the label of its first sub-word.
    """
    names = model.config.id2label
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        words = [list(re.finditer(r"\w+|[^\w\s]", text)) for text in chunk]
        batch = tokenizer(
            [[word.group() for word in row] or [""] for row in words],
            is_split_into_words=True,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            best = model(**batch.to(model.device)).logits.argmax(-1).tolist()
        for i, (text, row) in enumerate(zip(chunk, words)):
            labels = ["O"] * len(row)
            for position, word in reversed(list(enumerate(batch.word_ids(i)))):
                if word is not None and word < len(row):
                    labels[word] = names[best[i][position]]  # the first sub-word is written last
            yield [
                {
                    "text": text[row[first].start() : row[last - 1].end()],
                    "label": kind,
                    "start": row[first].start(),
                    "end": row[last - 1].end(),
                }
                for first, last, kind in spans(labels)
            ]
