"""MiCA: B holds the weight's weakest directions and stays; only A is trained. Ruediger and Raschka 2026,
arXiv:2604.01694.

    y = W x + s U_r A x,   W = U S V^T,  U_r its r last left singular vectors

    lora_A.weight (r, inp)           starts at zero        lora_embedding_A (r, rows) on an embedding
    lora_B.weight (out, r)  frozen   U_r                   lora_embedding_B (out, r)
Reached by init_lora_weights="mica". Merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import inits
from ..kinds import Spec
from ..site import Site
from ..view import View
from .lora import LoraFactors, lora_check, lora_tensors


class MiCA(LoraFactors):
    sites = frozenset({"linear", "embedding"})
    example: ClassVar[dict[str, Any]] = {"init_lora_weights": "mica"}

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)
        most = min(site.out, site.inp)
        if cfg.r > most:
            shape = tuple(site.stored.shape)
            raise ValueError(
                f"MiCA requires `r` <= min(in_features, out_features) but got r={cfg.r} for a layer with weight shape "
                f"{shape} (max usable r is {most}). ({site!r})"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        both = lora_tensors(cfg, site)
        return {k: replace(s, train="_A" in k) for k, s in both.items()}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        U = torch.linalg.svd(inits.matrix(weight(), p), full_matrices=False)[0]
        A, B = ("lora_embedding_A", "lora_embedding_B") if p.site.kind == "embedding" else ("lora_A", "lora_B")
        p.fill(A, torch.zeros_like(getattr(p, A)))
        p.fill(B, U[:, -cfg.r :])
        return None

    def changes_base(self, cfg: Any) -> bool:
        return False
