"""A normal with standard deviation 1 / r, B zero. arXiv:2106.09685, figure 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..view import View


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> None:
    if p.site.kind == "embedding":
        nn.init.zeros_(A)
        nn.init.normal_(B)
    else:
        nn.init.normal_(A, std=1 / cfg.r)
        nn.init.zeros_(B)
