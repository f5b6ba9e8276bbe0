"""OLoRA: B is orthonormal, A triangular, from the QR decomposition of the weight. arXiv:2406.01775, section 3.

W = Q R;   B = Q_r,   A = R_r,   W_base = W - s B A,   s the scaling
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..view import View
from . import matrix, split_base


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> Tensor:
    W = weight()
    Q, R = torch.linalg.qr(matrix(W, p))
    return split_base(A, B, R[: cfg.r], Q[:, : cfg.r], W, p)
