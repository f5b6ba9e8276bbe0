"""The rows that are being generated now: their key/value cache, padded on the left, which rows join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Batch", "groups"]

CALL = 32
"""What a call of the model costs beside its tokens, in tokens: reading the weights."""


def groups(lengths: Sequence[int], call: int = CALL) -> list[list[int]]:
    """Positions of prompts that are read together, so that what is read, padding and calls included, is least: of
    prompts in the order of their length, the best places to cut."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n: the least cost, and where its last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[k][0] + (end - k) * longest + call, k) for k in range(end)))
    out, end = [], len(order)
    while end:
        start = best[end][1]
        out.append(order[start:end])
        end = start
    return out[::-1]


class Batch:
    """mask (rows, length): 1 where a row has a token in the cache. last (rows, 1): the token to feed next."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.last = torch.zeros(0, 1, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.mask)

    def join(self, cache: Any, mask: Tensor, last: Tensor) -> None:
        """Add rows that were prefilled apart; the shorter side is padded on the left."""
        if not len(self):
            self.cache, self.mask, self.last = cache, mask, last
            return
        length = max(self.mask.shape[1], mask.shape[1])
        gaps = length - self.mask.shape[1], length - mask.shape[1]
        self.cache = _cache(
            [
                tuple(torch.cat([_pad(a, gaps[0]), _pad(b, gaps[1])]) for a, b in zip(mine, new, strict=True))
                for mine, new in zip(_layers(self.cache), _layers(cache), strict=True)
            ]
        )
        self.mask = torch.cat([F.pad(self.mask, (gaps[0], 0)), F.pad(mask, (gaps[1], 0))])
        self.last = torch.cat([self.last, last])

    def keep(self, rows: Sequence[int]) -> None:
        """Let the other rows go, and columns that then hold padding only."""
        if not rows:
            self.__init__()  # type: ignore[misc]
            return
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(0).int().argmax())
        self.cache = _cache([(k[index, :, start:], v[index, :, start:]) for k, v in _layers(self.cache)])
        self.mask, self.last = mask[:, start:], self.last[index]

    def feed(self, tokens: Tensor) -> None:
        """The tokens (rows,) to feed next."""
        self.last = tokens[:, None]

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's next call; the mask grows by the fed token."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        position = self.mask.sum(1, keepdim=True) - 1
        held = {"attention_mask": self.mask, "position_ids": position, "past_key_values": self.cache}
        return {"input_ids": self.last, "use_cache": True, **held}


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _pad(t: Tensor, n: int) -> Tensor:
    return F.pad(t, (0, 0, n, 0)) if n else t


def _cache(layers: Sequence[Any]) -> Any:
    from transformers import DynamicCache

    made = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        made.update(keys, values, i)
    return made
