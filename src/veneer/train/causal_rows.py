"""Rows of a language model (chats, prompts with completions, texts, or all of these): checks, tokens, what they ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from veneer.train.encode import Encoded, Piece, chat_pieces, encode_marked, encode_pieces, has_markers

if TYPE_CHECKING:
    from veneer.train.data import Table

__all__ = ["check_messages", "encode_rows", "example"]


def check_messages(messages: Any) -> str:
    """What is wrong with a conversation to learn from, or an empty string."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list of turns" if not isinstance(messages, list) else "'messages' is empty"
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"turn {number} has no 'role'"
        if not isinstance(turn.get("content"), str):
            return f"turn {number} ({turn['role']}) has no text in 'content'"
        if not turn["content"].strip() and turn["role"] != "system":
            return f"turn {number} ({turn['role']}) is empty"
    if not any(turn["role"] == "assistant" for turn in messages):
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
        return f"no turn of the assistant to learn from; the roles are {roles}"
    return ""


def encode_rows(table: Table, tokenizer: Any, first: int, last: int, as_chat: bool) -> list[Encoded]:
    """Tokens and labels of the rows ``first`` to ``last`` (not included), in their order.

    Raises:
        DataError: a chat, and no template for it or one that refuses it; by file and row.
    """
    rows = table.dataset[first:last]
    batch = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    kinds = [table.layout.of_row(row) for row in batch]
    found: dict[int, Encoded] = {}
    for kind in dict.fromkeys(kinds):
        numbers = [number for number, other in enumerate(kinds) if other == kind]
        own = [batch[number] for number in numbers]
        if kind == "text":
            made = encode_pieces(tokenizer, [[Piece(row["text"], True)] for row in own], chat=False)
        elif kind == "messages" or as_chat:
            chats = [row["messages"] if kind == "messages" else _as_turns(row) for row in own]
            made = _encode_chats(table, tokenizer, chats, [first + number for number in numbers])
        else:
            pairs = [[Piece(row["prompt"], False), Piece(row["completion"], True)] for row in own]
            made = encode_pieces(tokenizer, pairs, chat=False)
        found |= zip(numbers, made, strict=True)
    return [found[number] for number in range(len(batch))]


def _as_turns(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _encode_chats(table: Table, tokenizer: Any, chats: Sequence[Any], numbers: Sequence[int]) -> list[Encoded]:
    """Conversations, the rows ``numbers`` of a table."""
    if tokenizer.chat_template is None:
        hint = "Choose a chat model, or give `prompt` and `completion` columns without `options.as_chat`."
        raise table.error(numbers[0], "a chat, and the model has no chat template", hint)
    cut: Callable[[Any], Any] = lambda chat: chat_pieces(tokenizer, chat)
    if has_markers(tokenizer):
        cut = lambda chat: encode_marked(tokenizer, chat)
    found = []
    for number, chat in zip(numbers, chats, strict=True):
        try:
            found.append(cut(chat))
        except ValueError as error:
            raise table.error(number, str(error)) from error
    return found if has_markers(tokenizer) else encode_pieces(tokenizer, found, chat=True)


def example(table: Table, number: int) -> tuple[str, str]:
    """What a row asks last, and the answer it expects."""
    row = table.dataset[number]
    if table.layout.of_row(row) != "messages":
        return row["prompt"].strip(), row["completion"].strip()
    messages = row["messages"]
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant")
    asked = [turn["content"].strip() for turn in messages[:last] if turn["role"] == "user"]
    return (asked[-1] if asked else ""), messages[last]["content"].strip()
