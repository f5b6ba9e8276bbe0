"""Entities from word labels: spans of words, and labels for words of texts longer than the model reads at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from veneer.train.schemes import as_iobes

__all__ = ["spans", "tag_words", "words_of"]


def spans(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first word, last word + 1, type) of each entity, in any scheme of schemes.py; an I- after nothing begins one."""
    found: list[tuple[int, int, str]] = []
    closed = True
    for i, label in enumerate(as_iobes(labels)):
        prefix, _, kind = label.partition("-")
        if not kind:
            prefix, kind = ("O", "") if label == "O" else ("I", label)
        if prefix == "O":
            continue
        goes_on = prefix in {"I", "E"} and not closed
        if goes_on and found and found[-1][1] == i and found[-1][2] == kind:
            found[-1] = (found[-1][0], i + 1, kind)
        else:
            found.append((i, i + 1, kind))
        closed = prefix in {"E", "S"}
    return found


def words_of(text: str) -> list[tuple[int, int]]:
    """The words and single punctuation marks of a text, as characters [start, end)."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def tag_words(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[str]], limit: int, batch_size: int
) -> list[list[tuple[str, float]]]:
    """(label, probability) of each word of each row, read at the word's first sub-word.

    A row of more than ``limit`` tokens is read in windows that overlap by a quarter; a word is labelled by the
    window in which it lies farthest from an end. A word that becomes no token is `O`, with probability 1.
    """
    import datasets

    from veneer.train.collate import Collator, batches
    from veneer.train.generate import evaluating

    names = model.config.id2label
    best: list[list[tuple[int, str, float]]] = [[(-1, "O", 1.0)] * len(row) for row in rows]
    full = [number for number, row in enumerate(rows) if row]
    if not full:
        return [[] for _ in rows]
    out = tokenizer(
        [list(rows[number]) for number in full], is_split_into_words=True, truncation=True, max_length=limit,
        stride=limit // 4, return_overflowing_tokens=True, verbose=False,
    )  # fmt: skip
    owners = [full[number] for number in out["overflow_to_sample_mapping"]]
    columns = {"input_ids": out["input_ids"], "length": [len(ids) for ids in out["input_ids"]]}
    windows, device = datasets.Dataset.from_dict(columns), next(model.parameters()).device
    with evaluating(model):
        for part, batch in batches(windows, Collator(tokenizer.pad_token_id), batch_size, device):
            logits = model(**batch).logits[:, -batch["input_ids"].shape[1] :]  # virtual tokens come first
            shares, labels = (tensor.tolist() for tensor in logits.float().softmax(-1).max(-1))
            for window, share, label in zip(part, shares, labels, strict=True):
                words, last = out.word_ids(window), columns["length"][window] - 1
                for place, word in enumerate(words):
                    if word is None or (place and words[place - 1] == word):
                        continue
                    depth = min(place, last - place)
                    if depth > best[owners[window]][word][0]:
                        best[owners[window]][word] = (depth, names[label[place]], share[place])
    return [[(label, share) for _, label, share in row] for row in best]
