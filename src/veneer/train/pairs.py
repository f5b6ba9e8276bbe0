"""Preference pairs: what was asked, the better answer and the worse, as text or as messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veneer.train.batched import in_batches
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE, Encoded, Piece, chat_pieces, encode_pieces

if TYPE_CHECKING:
    from veneer.train.collate import GroupCollator
    from veneer.train.tasks.base import Plan

__all__ = [
    "ALIASES",
    "LAYOUTS",
    "SIDES",
    "are_messages",
    "check_pair",
    "collator",
    "conversation",
    "encode_pairs",
    "encode_side",
    "show_answers",
    "shown",
]

LAYOUTS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
ALIASES = {"prompt": ("question", "instruction"), "chosen": ("preferred",), "rejected": ("dispreferred",)}
SIDES = ("chosen", "rejected")


def are_messages(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, list)


def check_answer(layout: Layout, row: dict[str, Any]) -> str:
    """What is wrong with a prompt and its answers, or an empty string."""
    for role, column in layout.columns.items():
        value = row[role]
        if are_messages(value):
            good = all(isinstance(t, dict) and isinstance(t.get("role"), str) and t.get("content") for t in value)
            if not value or not good:
                return f"{column!r} is not a list of turns with a role and a content"
            if role != "prompt" and value[-1]["role"] != "assistant":
                return f"{column!r} ends with a turn of {value[-1]['role']}, expected the assistant"
        elif not isinstance(value, str) or not value.strip():
            return f"{column!r} {'is empty' if isinstance(value, str) else f'is {type(value).__name__}, expected text'}"
    return ""


def check_pair(layout: Layout, row: dict[str, Any]) -> str:
    """What is wrong with a row, or an empty string."""
    problem = check_answer(layout, row)
    if problem:
        return problem
    if are_messages(row["chosen"]) != are_messages(row["rejected"]):
        return "one of 'chosen' and 'rejected' is text, the other messages"
    if row["chosen"] == row["rejected"]:
        return "'chosen' and 'rejected' are the same"
    return ""


def conversation(row: dict[str, Any], side: str) -> tuple[list[dict[str, Any]], int]:
    """The turns of a row with one of its answers, and how many of them are the prompt."""
    prompt, answer = row.get("prompt"), row[side]
    if prompt is None:
        other = row.get(SIDES[1 - SIDES.index(side)], answer)
        same = next((i for i, (a, b) in enumerate(zip(answer, other)) if a != b), min(len(answer), len(other)))
        # the prompt ends where the assistant's last common say does: an answer is at least the last turn
        return list(answer), min(same, len(answer) - 1, len(other) - 1)
    before = prompt if are_messages(prompt) else [{"role": "user", "content": prompt}]
    if not are_messages(answer):
        return [*before, {"role": "assistant", "content": answer}], len(before)
    repeats = answer[: len(before)] == before
    return (list(answer) if repeats else [*before, *answer]), len(before)


def shown(row: dict[str, Any], side: str) -> tuple[str, str]:
    """The last question and the answer, as text."""
    if not are_messages(row[side]) and not are_messages(row.get("prompt")):
        return (row.get("prompt") or "").strip(), row[side].strip()
    turns, start = conversation(row, side)
    asked = [turn["content"].strip() for turn in turns[:start] if turn["role"] == "user"]
    return (asked[-1] if asked else ""), turns[-1]["content"].strip()


def encode_pairs(table: Table, tokenizer: Any, limit: int) -> tuple[dict[str, list[Any]], set[int], int]:
    """Columns `chosen_input_ids`, `chosen_labels` and so on, cut to ``limit`` tokens; labels on the answers alone.

    Returns the columns, the tokens that end answers, and how many rows were cut.

    Raises:
        DataError: a row whose answer is cut off whole, or messages without a chat template.
    """
    rows = table.dataset.to_list()
    columns: dict[str, list[Any]] = {"length": [0] * len(rows)}
    stops: set[int] = set()
    cut: set[int] = set()
    for side in SIDES:
        encoded = encode_side(table, rows, side, tokenizer)
        for number, row in enumerate(encoded):
            stops |= row.stops
            if len(row.input_ids) > limit:
                cut.add(number)
            if all(label == IGNORE for label in row.labels[:limit]):
                hint = f"Raise `data.max_length` (the row has {len(row.input_ids)} tokens) or shorten the prompt."
                raise table.error(number, f"nothing of {side!r} is left after cutting to {limit} tokens", hint)
        columns[f"{side}_input_ids"] = [row.input_ids[:limit] for row in encoded]
        columns[f"{side}_labels"] = [row.labels[:limit] for row in encoded]
        columns["length"] = [max(a, len(row.input_ids[:limit])) for a, row in zip(columns["length"], encoded)]
    return columns, stops, len(cut)


def encode_side(table: Table, rows: Sequence[dict[str, Any]], side: str, tokenizer: Any) -> list[Encoded]:
    """Tokens and labels of each row's prompt with one of its answers, uncut."""
    if are_messages(rows[0][side]) or are_messages(rows[0].get("prompt")):
        encode = lambda first, last: _encode_chats(table, rows[first:last], first, side, tokenizer)
    else:
        encode = lambda first, last: _encode_texts(rows[first:last], side, tokenizer)
    return list(itertools.chain.from_iterable(in_batches(len(rows), encode, table.workers)))


def _encode_texts(rows: Sequence[dict[str, Any]], side: str, tokenizer: Any) -> list[Encoded]:
    texts = [[Piece(row.get("prompt") or "", False), Piece(row[side], True)] for row in rows]
    return encode_pieces(tokenizer, texts, chat=False)


def _encode_chats(
    table: Table, rows: Sequence[dict[str, Any]], before: int, side: str, tokenizer: Any
) -> list[Encoded]:
    if tokenizer.chat_template is None:
        hint = "Choose a chat model, or give `prompt`, `chosen` and `rejected` as text."
        raise table.error(before, "a chat, and the model has no chat template", hint)
    pieces = []
    for number, row in enumerate(rows):
        turns, start = conversation(row, side)
        try:
            cut = chat_pieces(tokenizer, turns)
        except ValueError as error:
            raise table.error(before + number, str(error)) from error
        skip = sum(turn["role"] == "assistant" for turn in turns[:start])
        trained = [index for index, piece in enumerate(cut) if piece.trained]
        kept = set(trained[skip:])
        pieces.append([Piece(piece.text, index in kept) for index, piece in enumerate(cut)])
    return encode_pieces(tokenizer, pieces, chat=True)


def show_answers(plan: Plan, test: Table) -> None:
    """Put the test rows' prompts and both answers into the plan, as text."""
    rows = test.dataset.to_list()
    plan.examples = [shown(row, "chosen") for row in rows]
    plan.targets = [shown(row, "rejected")[1] for row in rows]


def collator(tokenizer: Any, multiple_of: int) -> GroupCollator:
    """Chosen and rejected answers in turn."""
    from veneer.train.collate import Collator, GroupCollator

    return GroupCollator(Collator(tokenizer.pad_token_id, multiple_of), SIDES)
