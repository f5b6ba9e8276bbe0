"""What the layers of one model share: which adapters are active, and the data of the call in progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BASE = "__base__"


@dataclass(frozen=True)
class Rows:
    """A batch whose rows use different adapters: names, and for each row an index into them (-1: the base)."""

    names: tuple[str, ...]
    index: Tensor  # (rows,) int64
    widened: int = 1  # beams and sampled sequences: copies of each row that a search makes, next to each other

    def for_batch(self, size: int) -> Tensor | None:
        """The index for a batch of `size` rows, as they came in or widened by a search; None for another size."""
        if size == len(self.index):
            return self.index
        return self.index.repeat_interleave(self.widened) if size == len(self.index) * self.widened else None

    @classmethod
    def of(cls, adapter_names: Sequence[str], widened: int = 1) -> Rows:
        names = tuple(dict.fromkeys(n for n in adapter_names if n != BASE))
        at = {n: i for i, n in enumerate(names)} | {BASE: -1}
        return cls(names, torch.tensor([at[n] for n in adapter_names]), widened)


@dataclass
class Host:
    """Shared by every adapted layer of one model, so that switching adapters is constant work.

    active: names in the order they act. enabled: False makes every layer the base. version: raised on each
    change; layers rebuild what they cache when it moves. rows, data: per call, None or empty outside one.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    version: int = 0
    rows: Rows | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def activate(self, names: Sequence[str]) -> None:
        self.active = tuple(names)
        self.version += 1

    def enable(self, on: bool) -> None:
        self.enabled = on
        self.version += 1

    @contextmanager
    def call(self, rows: Rows | None = None, **data: Any) -> Iterator[None]:
        """Data for the layers during one forward or generate call."""
        before = self.rows, self.data
        self.rows, self.data = rows if rows is not None else self.rows, {**self.data, **data}
        try:
            yield
        finally:
            self.rows, self.data = before
