"""Both A and B random, so that the adapter changes the output at once: for tests and debugging."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..view import View


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> None:
    for t in (A, B):
        if p.site.kind == "embedding":
            nn.init.normal_(t)
        else:
            nn.init.kaiming_uniform_(t, a=math.sqrt(5))
