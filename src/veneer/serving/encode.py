"""Texts that are read and not continued: embeddings and classes, several requests in one call of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Encoder", "Reading"]

Wanted = Literal["embedding", "classes"]


@dataclass
class Reading:
    """One request: token ids of each text. emit: called once from the engine's thread with one row a text (float32,
    on the CPU), or with the error's text."""

    texts: list[list[int]]
    adapter: str | None
    wanted: Wanted
    emit: Callable[[list[Tensor] | str], None]
    cancelled: bool = False
    rows: list[Tensor] = field(default_factory=list)


class Encoder:
    """pooling: mean over a text's tokens, its first token or its last. most: texts in one call."""

    def __init__(self, pooling: Literal["mean", "cls", "last"], most: int):
        self.pooling, self.most = pooling, most
        self.open: deque[Reading] = deque()

    def adapters(self) -> set[str]:
        return {r.adapter for r in self.open if r.adapter is not None}

    def step(self, call: Callable[..., Any]) -> int:
        """One call of the model for as many waiting texts as fit; returns how many. Requests that are complete
        answer."""
        for reading in [r for r in self.open if r.cancelled]:
            self.open.remove(reading)
        if not self.open:
            return 0
        wanted = self.open[0].wanted
        taken: list[tuple[Reading, list[int]]] = []
        for reading in self.open:
            if reading.wanted == wanted:
                taken += [(reading, ids) for ids in reading.texts[len(reading.rows) :]][: self.most - len(taken)]
        found = self._rows(call, taken, wanted)
        for (reading, _), row in zip(taken, found, strict=True):
            reading.rows.append(row)
        for reading in [r for r in self.open if len(r.rows) == len(r.texts)]:
            self.open.remove(reading)
            reading.emit(reading.rows)
        return len(taken)

    def fail(self, why: str) -> None:
        """Answer every open request with an error."""
        for reading in self.open:
            reading.emit(why)
        self.open.clear()

    def _rows(self, call: Callable[..., Any], taken: list[tuple[Reading, list[int]]], wanted: Wanted) -> Tensor:
        length = max(len(ids) for _, ids in taken)
        ids = torch.stack([F.pad(torch.tensor(i), (0, length - len(i))) for _, i in taken])
        mask = torch.stack([F.pad(torch.ones(len(i), dtype=torch.long), (0, length - len(i))) for _, i in taken])
        inputs = {"input_ids": ids, "attention_mask": mask}
        jobs = [r for r, _ in taken]
        if wanted == "classes":
            return call(jobs, **inputs).logits.float().cpu()
        out = call(jobs, output_hidden_states=True, **inputs)
        last = out.get("last_hidden_state")
        return self._pool(out.hidden_states[-1] if last is None else last, mask).cpu()

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors (texts, d) of length 1 from hidden states (texts, tokens, d)."""
        hidden, mask = hidden.float(), mask.to(hidden.device)
        if self.pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            place = torch.zeros_like(mask[:, 0]) if self.pooling == "cls" else mask.sum(1) - 1
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), place]
        return F.normalize(pooled, dim=-1)
