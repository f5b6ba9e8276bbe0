"""PiSSA: A and B hold the weight's leading singular directions, the base the rest. arXiv:2404.02948, section 3.

    W = U S V^T;   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T,   W_base = W - s B A,   s the scaling

"pissa_niter_N" finds them by a randomised method with N power iterations (Halko et al. 2011) in a fraction of the
time, from a fixed seed.
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
    M = matrix(W, p)
    _, _, niter = str(cfg.init_lora_weights).lower().partition("_niter_")
    if niter:
        with torch.random.fork_rng([M.device] if M.is_cuda else []):
            torch.manual_seed(0)  # loading splits the base again and must find the same rest
            U, S, V = torch.svd_lowrank(M, q=cfg.r, niter=int(niter))
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = (S[: cfg.r] / p.scaling).sqrt()
    return split_base(A, B, root[:, None] * Vh[: cfg.r], U[:, : cfg.r] * root, W, p)
