"""Finished runs, read back from the folders that `veneer train` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.train.errors import DataError, nearest

__all__ = ["Run", "read_run", "read_runs"]

FILE = "result.json"
KEYS = (
    "task", "recipe", "before", "after", "samples", "train_seconds", "train_tokens", "trainable_params",
    "total_params", "machine",
)  # fmt: skip
"""What a result.json must hold to be put beside others."""


@dataclass(frozen=True)
class Run:
    """A run's `result.json` and `log.jsonl`.

    ``recipe`` is nested plain values, so that a run of another version can be read too; ``adapter_bytes`` the size of
    the adapter's tensors, None where they are gone; ``peak_memory_mb`` 2**20 bytes, None where no line says.
    """

    name: str
    folder: Path
    task: str
    recipe: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    train_seconds: float
    train_tokens: int
    trainable_params: int
    total_params: int
    adapter_bytes: int | None
    machine: dict[str, Any]

    @property
    def base(self) -> str:
        return str(self.recipe["base"]["name"]).rstrip("/").rsplit("/", 1)[-1]

    @property
    def method(self) -> str:
        return str(self.recipe["adapter"]["method"])

    @property
    def tokens_per_second(self) -> float | None:
        return self.train_tokens / self.train_seconds if self.train_seconds > 0 else None

    @property
    def peak_memory_mb(self) -> float | None:
        return max((row["peak_memory_mb"] for row in self.history if "peak_memory_mb" in row), default=None)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several runs, each under a name of its own: the end of its path that tells it from the others.

    Raises:
        DataError: a folder that is no finished run, or one given twice.
    """
    roots: list[Path] = []
    for folder in folders:
        root = _root(Path(folder))
        if root in roots:
            raise DataError("the same run is given twice", file=folder, hint="Give each run once.")
        roots.append(root)
    return [read_run(root, name) for root, name in zip(roots, _names(roots), strict=True)]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """One run, from its folder, its `result.json` or its `adapter`.

    Raises:
        DataError: there is no finished run, or its files are damaged.
    """
    root = _root(Path(folder))
    path = root / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"this is not JSON: {error}", file=path, hint="Train again into this folder.") from error
    missing = [key for key in KEYS if key not in found] if isinstance(found, dict) else list(KEYS)
    if missing:
        hint = "It was not written by `veneer train`, or was changed since."
        raise DataError(f"{', '.join(missing)} missing", file=path, hint=hint)
    return Run(
        name=name or root.name,
        folder=root,
        history=_history(root / "log.jsonl"),
        adapter_bytes=_adapter_bytes(root / "adapter"),
        **{key: found[key] for key in KEYS},
    )


def _root(path: Path) -> Path:
    """The run's own folder, absolute."""
    folder = Path(os.path.abspath(path))
    for place in (folder, folder.parent) if path.name in (FILE, "adapter") else (folder,):
        if (place / FILE).is_file():
            return place
    problem = f"this is no finished run: it holds no {FILE}" if folder.exists() else "there is no such folder"
    raise DataError(problem, file=path, hint=_what_to_do(folder))


def _what_to_do(folder: Path) -> str:
    if (folder.parent / f".{folder.name}.partial").is_dir():
        return "A run of that name is not finished: call `veneer train` again as before, it goes on where it was."
    if (folder / "adapter_config.json").is_file():
        return "It is an adapter without its run; `veneer diff` compares two adapters."
    inside = _runs_in(folder)
    if inside:
        return f"It holds runs: give {', '.join(str(folder / name) for name in inside[:6])}."
    beside = _runs_in(folder.parent)
    near = nearest(folder.name, beside)
    if near is not None:
        return f"Did you mean {folder.parent / near}?"
    return f"Runs in {folder.parent}: {', '.join(beside[:6])}." if beside else "Give folders `veneer train` wrote."


def _runs_in(folder: Path) -> list[str]:
    return sorted(item.parent.name for item in folder.glob(f"*/{FILE}")) if folder.is_dir() else []


def _names(roots: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(root.parts) for root in roots) + 1):
        names = ["/".join(root.parts[-depth:]) for root in roots]
        if len(set(names)) == len(names):
            return names
    return [str(root) for root in roots]


def _history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            hint = "Delete the line, or the file: a run without a log is compared without curves."
            raise DataError(f"this is not JSON: {error}", file=path, line=number, hint=hint) from error
    return rows


def _adapter_bytes(folder: Path) -> int | None:
    sizes = [path.stat().st_size for path in folder.glob("adapter_model.*") if path.suffix in (".safetensors", ".bin")]
    return sum(sizes) if sizes else None
