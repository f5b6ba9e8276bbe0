"""Rows of dataclasses as pandas tables, and these as files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["to_frame", "write_frame"]


def to_frame(rows: Sequence[Any]) -> DataFrame:
    """One row for each dataclass: its fields, then its properties (relative_norm, block, ...)."""
    import pandas as pd

    return pd.DataFrame([_values(row) for row in rows])


def _values(row: Any) -> dict[str, Any]:
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    derived = [k for k, v in vars(type(row)).items() if isinstance(v, property)]
    return fields | {k: getattr(row, k) for k in derived}


def write_frame(rows: Sequence[Any], path: str | Path) -> Path:
    """Write rows as .csv, .json or .parquet, beside and renamed. Raises AdapterError for another ending."""
    from ..files import write_atomic

    path, table = Path(path), to_frame(rows)
    writers: dict[str, Any] = {
        ".csv": lambda p: table.to_csv(p, index=False),
        ".json": lambda p: table.to_json(p, orient="records", indent=2),
        ".parquet": lambda p: table.to_parquet(p, index=False),
    }
    if path.suffix.lower() not in writers:
        raise AdapterError(f"{path}: a table is written as {', '.join(writers)}; name the file so")
    write_atomic(os.fspath(path), writers[path.suffix.lower()])
    return path
