"""A small net, a small Llama's sizes, and a mark that runs a test in veneer and in peft."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import veneer

__all__ = ["BOTH", "SIZES", "Net"]

BOTH = pytest.mark.parametrize("lib", [veneer, peft], ids=["veneer", "peft"])
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lin, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(self.table(ids)))
