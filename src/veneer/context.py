"""What the layers of one model share: which adapters are active, and the data of the call in progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError

BASE = "__base__"


@dataclass(frozen=True)
class Rows:
    """A batch whose rows use different adapters: names, and for each row an index into them (-1: the base)."""

    names: tuple[str, ...]
    index: Tensor  # (rows,) int64
    widened: int = 1  # beams and sampled sequences: copies of each row that a search makes, next to each other
    goes_on: bool = False  # the call goes on from a key/value cache, as each token of a decoding loop does

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for batches that use the same adapters in the same rows."""
        return self.names, tuple(self.index.tolist()), self.widened

    def for_batch(self, size: int, where: object) -> Tensor:
        """The index for a batch of `size` rows, as they came in or widened by a search. where: what to name in the
        error for another size."""
        if size == len(self.index):
            return self.index
        if size == len(self.index) * self.widened:
            return self.index.repeat_interleave(self.widened)
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.index)} names and {size} rows at {where}; give one name a row"
        )

    @classmethod
    def of(cls, adapter_names: Sequence[str], widened: int = 1, goes_on: bool = False) -> Rows:
        names = tuple(dict.fromkeys(n for n in adapter_names if n != BASE))
        at = {n: i for i, n in enumerate(names)} | {BASE: -1}
        return cls(names, torch.tensor([at[n] for n in adapter_names]), widened, goes_on)


def per_row(given: Tensor, size: int) -> Tensor:
    """One entry a row of a batch of `size` rows: as given, or each repeated for the copies that a search makes of its
    row and for the tokens of a flattened batch, which lie next to each other."""
    if len(given) == size:
        return given
    if size % len(given):
        raise AdapterError(f"{len(given)} entries were given for a batch of {size} rows; give one a row")
    return given.repeat_interleave(size // len(given), 0)


@dataclass
class Host:
    """Shared by every adapted layer of one model, so that switching adapters walks no modules.

    active: names in the order they act. enabled: False makes every layer the base. version: raised on each
    change; layers rebuild what they cache when it moves. rows, data: per call, None or empty outside one.
    irregular, apart, merged: what a layer may have been set to by itself, so that the usual case needs no look at them.
    unfrozen: adapters whose tensors may require gradients. structure: raised when tensors come, go or move. traced: the
    layers that are part of compiled code, which are told of a switch (live.py).
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    version: int = 0
    irregular: bool = False  # a layer may have been disabled by itself
    apart: bool = False  # a layer may have active adapters of its own
    merged: bool = False  # a layer may hold adapters in its weight
    unfrozen: set[str] = field(default_factory=set)
    structure: int = 0
    traced: list[Any] = field(default_factory=list)
    rows: Rows | None = None
    data: dict[str, Any] = field(default_factory=dict)
    past: dict[str, Any] = field(default_factory=dict)  # of the last training call, for what backward computes again
    replayed: bool = True
    ambiguous: bool = False

    def activate(self, names: Sequence[str]) -> None:
        self.active = tuple(names)
        self.version += 1
        for layer in self.traced:
            layer.look_up_live()

    def enable(self, on: bool) -> None:
        self.enabled = on
        self.version += 1

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no call's data."""
        return {**self.__dict__, "rows": None, "data": {}, "past": {}, "replayed": True, "ambiguous": False}

    def given(self) -> dict[str, Any]:
        """The call's data; outside a call, while a backward pass computes a checkpointed layer again, that of the
        last training call."""
        if self.data or not self.past or torch._C._current_graph_task_id() == -1:
            return self.data
        self.replayed = True
        if self.ambiguous:
            raise AdapterError(
                f"two forward passes with different {', '.join(self.past)} came before one backward pass, and with "
                "gradient checkpointing it is not known which of them a layer is computed again for; call backward "
                "after each forward pass"
            )
        return self.past

    def remember(self) -> None:
        """Keep the call's data for its backward pass."""
        waiting = bool(self.past) and not self.replayed
        self.ambiguous = waiting and (self.ambiguous or not _same(self.past, self.data))
        self.past, self.replayed = self.data, False

    @contextmanager
    def call(self, rows: Rows | None = None, **data: Any) -> Iterator[None]:
        """Data for the layers during one forward or generate call."""
        before = self.rows, self.data
        self.rows, self.data = rows if rows is not None else self.rows, {**self.data, **data}
        try:
            yield
        finally:
            self.rows, self.data = before


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two calls gave the same; tensors by value."""
    if a.keys() != b.keys():
        return False
    both = [(a[k], b[k]) for k in a]
    return all(torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y for x, y in both)
