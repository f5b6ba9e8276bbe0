"""Small layers and a small language model, on which a method shows what it can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

INP, OUT = 128, 64
SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


class _Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, INP)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(INP, OUT), lambda: torch.randn(3, 5, INP)),
    "Conv1D (GPT-2)": (_conv1d_of_transformers, lambda: torch.randn(3, 5, INP)),
    "Conv1d": (lambda: nn.Conv1d(INP, OUT, 3), lambda: torch.randn(3, INP, 5)),
    "Conv2d": (lambda: nn.Conv2d(INP, OUT, 3), lambda: torch.randn(3, INP, 5, 4)),
    "Conv3d": (lambda: nn.Conv3d(INP, OUT, 2), lambda: torch.randn(3, INP, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(INP, OUT), lambda: torch.randint(0, INP, (3, 5))),
    "MultiheadAttention": (lambda: _Attention(INP, 4, batch_first=True), lambda: torch.randn(3, 5, INP)),
    "LayerNorm": (lambda: nn.LayerNorm(OUT), lambda: torch.randn(3, 5, OUT)),
}


class Net(nn.Module):
    """One layer of the same weights on every call; its name is "layer"."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.layer = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def language_model() -> Any:
    """A Llama of two layers, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).eval()
