"""A and B both non-zero with B A = 0: the columns of an orthogonal r x r matrix are shared out between them.

Odd rows of Q span what A reads, even rows what B writes; their product vanishes. r must be even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..view import View


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> None:
    r = cfg.r
    if r % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    if p.site.groups > 1:
        raise ValueError("this initial value needs a convolution without groups")
    Q, _ = torch.linalg.qr(torch.rand(r, r, device=A.device))
    columns = A.flatten(1).shape[1]
    down = torch.randn(columns, r // 2, device=A.device) @ Q[0::2] / 10
    up = torch.randn(p.site.out, r // 2, device=A.device) @ Q[1::2] / 10
    A.copy_(down.T.reshape(A.shape))
    B.copy_(up.reshape(B.shape))
