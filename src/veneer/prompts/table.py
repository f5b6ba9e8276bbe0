"""Table: a prompt of one row a virtual token, stored as it is used or sent through a transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..sharded import like


class Table(nn.Module):
    """embedding.weight (n, width), drawn from a standard normal; the call returns it, through `transform` where
    there is one. indices (rows, k): those virtual tokens, (rows, k, width)."""

    def __init__(self, n: int, width: int, transform: nn.Module | None = None):
        super().__init__()
        self.embedding = nn.Embedding(n, width)
        self.transform = transform

    def forward(self, indices: Tensor | None = None) -> Tensor:
        x = self.embedding.weight if indices is None else self.embedding(indices)
        return x if self.transform is None else self.transform(x)


def finished(name: str, encoder: nn.Module, value: Tensor) -> nn.Module:
    """A finished prompt from a file: into the encoder where it is a plain Table, else a Table that takes its place,
    since what made the prompt is not in the file."""
    with torch.no_grad():
        now = encoder()
    fits(name, "prompt_embeddings", value, tuple(now.shape))
    plain = isinstance(encoder, Table) and encoder.transform is None
    table: Any = encoder if plain else Table(*value.shape).to(now)
    with torch.no_grad():
        table.embedding.weight.copy_(like(value, table.embedding.weight))
    return table


def fits(name: str, key: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise AdapterError where a file's tensor is not of the shape that the config and the base ask for."""
    if tuple(value.shape) != shape:
        raise AdapterError(
            f"{name}: the file's {key} have shape {tuple(value.shape)}, this model and config need {shape} "
            "(virtual tokens, width); load it with the config and the base it was made for"
        )
