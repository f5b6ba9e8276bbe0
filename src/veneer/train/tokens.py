"""Columns of text to columns of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veneer.train.batched import in_batches

if TYPE_CHECKING:
    from veneer.train.data import Table

__all__ = ["encode_texts"]


def encode_texts(
    table: Table, tokenizer: Any, roles: Sequence[str], limit: int
) -> tuple[dict[str, list[Any]], list[bool]]:
    """`input_ids`, `length` (and `token_type_ids`, where the model has them) of one text a row, or of two.

    Returns the columns and whether each row was cut to ``limit`` tokens, the longer text first.
    """
    present = [role for role in roles if role in table.layout.columns]
    columns: dict[str, list[Any]] = {"input_ids": [], "length": []}
    cut: list[bool] = []

    def encode(first: int, last: int) -> tuple[list[list[int]], list[list[int]] | None, list[bool]]:
        batch = table.dataset[first:last]
        out = tokenizer(
            *(batch[role] for role in present),
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
        )
        types = out["token_type_ids"] if "token_type_ids" in out and len(present) > 1 else None
        return out["input_ids"], types, [bool(encoding.overflowing) for encoding in out.encodings]

    for ids, types, over in in_batches(len(table), encode, table.workers):
        cut += over
        columns["input_ids"] += ids
        columns["length"] += [len(row) for row in ids]
        if types is not None:
            columns.setdefault("token_type_ids", []).extend(types)
    return columns, cut
