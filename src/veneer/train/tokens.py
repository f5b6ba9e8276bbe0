"""Columns of text to columns of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.train.data import Table

__all__ = ["encode_texts"]

BATCH = 1000


def encode_texts(
    table: Table, tokenizer: Any, roles: Sequence[str], limit: int
) -> tuple[dict[str, list[Any]], list[bool]]:
    """`input_ids`, `length` (and `token_type_ids`, where the model has them) of one text a row, or of two.

    Returns the columns and whether each row was cut to ``limit`` tokens, the longer text first.
    """
    present = [role for role in roles if role in table.layout.columns]
    columns: dict[str, list[Any]] = {"input_ids": [], "length": []}
    cut: list[bool] = []
    for first in range(0, len(table), BATCH):
        batch = table.dataset[first : first + BATCH]
        out = tokenizer(
            *(batch[role] for role in present),
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
        )
        cut += [bool(encoding.overflowing) for encoding in out.encodings]
        columns["input_ids"] += out["input_ids"]
        columns["length"] += [len(row) for row in out["input_ids"]]
        if "token_type_ids" in out and len(present) > 1:
            columns.setdefault("token_type_ids", []).extend(out["token_type_ids"])
    return columns, cut
