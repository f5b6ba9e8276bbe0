"""Small layers with generic shapes (in != out, several blocks), one of each kind a method may meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Layer(NamedTuple):
    kind: str  # the kind of Site it makes
    module: Callable[[], nn.Module]
    input: Callable[[], Tensor]


SITES: dict[str, Layer] = {
    "Linear": Layer("linear", lambda: nn.Linear(24, 16), lambda: torch.randn(3, 5, 24)),
    "Linear-no-bias": Layer("linear", lambda: nn.Linear(16, 24, bias=False), lambda: torch.randn(3, 16)),
    "Conv1D": Layer("linear", lambda: Conv1D(16, 24), lambda: torch.randn(3, 5, 24)),
    "Conv1d": Layer("conv", lambda: nn.Conv1d(12, 8, 3, stride=2, padding=1), lambda: torch.randn(3, 12, 9)),
    "Conv1d-circular": Layer(
        "conv",
        lambda: nn.Conv1d(12, 8, 3, dilation=2, padding=1, padding_mode="circular"),
        lambda: torch.randn(3, 12, 9),
    ),
    "Conv2d": Layer("conv", lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), lambda: torch.randn(3, 12, 5, 6)),
    "Conv2d-1x1": Layer("conv", lambda: nn.Conv2d(12, 8, 1, bias=False), lambda: torch.randn(3, 12, 4, 3)),
    "Conv2d-groups": Layer("conv", lambda: nn.Conv2d(12, 8, 3, groups=4), lambda: torch.randn(3, 12, 4, 5)),
    "Conv3d": Layer("conv", lambda: nn.Conv3d(12, 8, 2), lambda: torch.randn(2, 12, 3, 3, 3)),
    "Embedding": Layer("embedding", lambda: nn.Embedding(11, 16), lambda: torch.randint(0, 11, (3, 5))),
    "LayerNorm": Layer("module", lambda: nn.LayerNorm(16), lambda: torch.randn(3, 5, 16)),
}
