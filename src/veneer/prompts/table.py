"""Table: a prompt stored as it is used, one row a virtual token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import AdapterError


class Table(nn.Module):
    """embedding.weight (n, width), drawn from a standard normal; the call returns it."""

    def __init__(self, n: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(n, width)

    def forward(self) -> Tensor:
        return self.embedding.weight


def finished(name: str, encoder: nn.Module, value: Tensor) -> nn.Module:
    """A finished prompt from a file: into the encoder where it is a Table, else a Table that takes its place,
    since what made the prompt is not in the file."""
    with torch.no_grad():
        now = encoder()
    if value.shape != now.shape:
        raise AdapterError(
            f"{name}: the file's prompt_embeddings have shape {tuple(value.shape)}, this model and config "
            f"need {tuple(now.shape)} (virtual tokens, width); load it with the config and the base it was "
            "made for"
        )
    table = encoder if isinstance(encoder, Table) else Table(*value.shape).to(now)
    with torch.no_grad():
        table.embedding.weight.copy_(value)
    return table
