"""What is odd about a run's rows: not wrong enough to stop it, and often the reason why it learns nothing."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from veneer.train.encode import IGNORE

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    from veneer.train.data import Table
    from veneer.train.prepare import Parts
    from veneer.train.recipe import Recipe

__all__ = ["data_warnings", "pad_warning", "row_for_row"]


def data_warnings(recipe: Recipe, parts: Parts, train: Table, test: Table | None) -> list[str]:
    """One sentence each, with the number of rows and where the first of them is."""
    own = parts.task.row_warnings(recipe, parts.plan, train, test)
    found = [*_repeated(train, test), *_tokens(recipe, parts, train), *own]
    return [text for text in found if text]


def row_for_row(recipe: Recipe, made: Dataset, table: Table) -> bool:
    """Whether the rows made of a table's are one for each, in their order: neither put together nor cut up."""
    joined = recipe.options.get("packing", "none") != "none"
    joined = joined or (recipe.task == "masked-lm" and recipe.options.get("join", True))
    return not joined and len(made) == len(table)


def _texts(table: Table) -> list[str]:
    rows = ({role: value for role, value in row.items() if value is not None} for row in table.dataset)
    return [json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows]


def _place(table: Table, row: int) -> str:
    place = table.places[row]
    return str(place) if place.line is not None or place.file != table.path else f"row {place.row + 1}"


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _repeated(train: Table, test: Table | None) -> list[str]:
    """Duplicates within the training rows, and test rows that are among them."""
    first: dict[str, int] = {}
    again = [(row, first[text]) for row, text in enumerate(_texts(train)) if first.setdefault(text, row) != row]
    again = [(row, same) for row, same in again if train.places[row] != train.places[same]]  # drawn again by weight
    out = []
    if again:
        (row, same), number = again[0], len(again)
        word = "repeats" if number == 1 else "repeat"
        out.append(f"{_rows(number)} {word} an earlier one: {_place(train, row)} is {_place(train, same)} again.")
    leaked = [] if test is None else [(row, first[text]) for row, text in enumerate(_texts(test)) if text in first]
    if leaked and test is not None:
        row, same = leaked[0]
        out.append(
            f"{_rows(len(leaked))} of the test set {'is' if len(leaked) == 1 else 'are'} among the training rows, so "
            f"scores will be too good: {_place(test, row)} is {_place(train, same)}."
        )
    return out


def _tokens(recipe: Recipe, parts: Parts, table: Table) -> list[str]:
    """What is odd about the rows as tokens."""
    whole = row_for_row(recipe, parts.plan.train, table)
    where = lambda row: str(table.places[row]) if whole else f"row {row + 1} of those made of {table.path.name}"
    train, tokenizer = parts.plan.train, parts.tokenizer
    columns = [name for name in train.column_names if name.endswith("input_ids")]
    out = [_unseen(recipe, parts, columns)]
    for name in columns:
        labels = f"{name.removesuffix('input_ids')}labels"
        if labels in train.column_names and isinstance(train[0][labels], list):
            out += _labels(recipe, parts, train[name], train[labels], where)
        out.append(_double_start(tokenizer, train[name], where))
    return out


def _unseen(recipe: Recipe, parts: Parts, columns: list[str]) -> str:
    """New tokens that no row holds, whose rows of the embedding would stay as they are."""
    if not parts.tokens:
        return ""
    sides = [*columns, *(name for name in ("labels",) if recipe.task == "seq2seq")]
    seen = {token for name in sides for row in parts.plan.train[name] for token in row}
    never = [text for text, token in zip(recipe.tokens, parts.tokens, strict=True) if token not in seen]
    if not never:
        return ""
    one = len(never) == 1
    what = f"The new token{'' if one else 's'} {', '.join(never)} {'is' if one else 'are'} in no training row"
    return f"{what}, so nothing is learned of {'it' if one else 'them'}."


def pad_warning(tokenizer: Any) -> list[str]:
    """What a run will do about its pad token, which it says itself when it does it."""
    if tokenizer.pad_token_id is None:
        return ["The tokenizer names no pad token; a safe one is chosen when the model is loaded."]
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return [f"The pad token {tokenizer.pad_token} also ends an answer; another is chosen if one is free."]
    return []


def _labels(recipe: Recipe, parts: Parts, ids: Any, labels: Any, where: Callable[[int], str]) -> list[str]:
    limit = recipe.data.max_length
    ends = [_last_learned(values) for values in labels]
    masked = [row for row, last in enumerate(ends) if not last]
    out = []
    if masked:
        cut = sum(len(ids[row]) >= limit for row in masked)
        why = f", {cut:,} of them because they were cut to {limit} tokens before the answer began" if cut else ""
        word = "teaches" if len(masked) == 1 else "teach"
        out.append(f"{_rows(len(masked))} ({where(masked[0])} first) {word} nothing: every label is masked{why}.")
    if not parts.task.writes:
        return out
    stops = {*parts.plan.stop_ids, parts.tokenizer.eos_token_id} - {None}
    open_ended = [row for row, last in enumerate(ends) if stops and last and not stops & set(last)]
    if open_ended and recipe.options.get("packing", "none") == "none":
        full = sum(len(row) >= limit for row in ids)
        why = f"; {_rows(full)} cut to {limit} tokens" if full else ""
        word = "ends" if len(open_ended) == 1 else "end"
        out.append(
            f"{_rows(len(open_ended))} ({where(open_ended[0])} first{why}) {word} without a token that ends an answer: "
            "the model may not stop."
        )
    return out


def _last_learned(labels: list[int]) -> list[int]:
    """The last three labels of a row that are learned; rows are long and answers lie at their end."""
    return list(itertools.islice((label for label in reversed(labels) if label != IGNORE), 3))


def _double_start(tokenizer: Any, ids: Any, where: Callable[[int], str]) -> str:
    start = tokenizer.bos_token_id
    twice = [row for row, values in enumerate(ids) if start is not None and list(values[:2]) == [start, start]]
    if not twice:
        return ""
    word = "begins" if len(twice) == 1 else "begin"
    return f"{_rows(len(twice))} ({where(twice[0])} first) {word} with {tokenizer.bos_token} twice."
