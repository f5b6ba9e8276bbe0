"""A as PyTorch draws a Linear's weight, B zero: the change starts at zero. arXiv:2106.09685, section 4.1.
An embedding's A is zero and its B normal, so that rows get their own gradients from the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..view import View


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> None:
    if p.site.kind == "embedding":
        nn.init.zeros_(A)
        nn.init.normal_(B)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)
