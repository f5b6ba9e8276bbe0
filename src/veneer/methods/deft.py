"""DEFT: what the weight has in a small learned subspace is taken out, and a learned content put there.
peft's documentation of DEFT is the source; no paper is cited by it.

    W' = W + L (s R - S^T W),   S = relu(P), L = P   (decomposition_method "relu")   or   S = L = qr(P).Q   ("qr")

    deft_P (out, r)   deft_R (r, inp), absent with para; starts as S^T W / s, so that W' = W

s = alpha / r, or 1 without alpha; r is at most the smaller size of W. With para the subspace is only taken out,
W' = W - L S^T W, so a fresh adapter changes the model a little. Merges. Low rank given W, so the change is never
formed. Beyond peft: nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View


@dataclass
class DeftConfig(AdapterConfig):
    """r: size of the subspace. decomposition_method: "relu" or "qr". alpha: R is scaled by alpha / r.

    para: train P alone. init_scale: with init_weights=False, R is drawn at this times 0.02; for tests.
    deft_dropout: on the adapter's input.
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "DEFT"
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"Unknown decomposition_method {self.decomposition_method!r}; use 'relu' or 'qr'")


def rank(cfg: DeftConfig, site: Site) -> int:
    return min(cfg.r, site.out, site.inp)


class DEFT(LowRank):
    Config = DeftConfig
    prefix = "deft_"
    dropout = "deft_dropout"

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        r = rank(cfg, site)
        out = {"deft_P": Spec((site.out, r), raw=True)}
        return out if cfg.para else {**out, "deft_R": Spec((r, site.inp), raw=True)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        p.fill("deft_P", 0.02 * torch.randn_like(p.deft_P))
        if cfg.para:
            return None
        if not cfg.init_weights:
            p.fill("deft_R", 0.02 * cfg.init_scale * torch.randn_like(p.deft_R))
            return None
        with torch.no_grad():
            S = self.subspace(p)[1]
            p.fill("deft_R", S.mT @ weight().to(S.dtype) / self.content(p))
        return None

    def content(self, p: View) -> float:
        return p.cfg.alpha / rank(p.cfg, p.site) if p.cfg.alpha else 1.0

    def subspace(self, p: View) -> tuple[Tensor, Tensor]:
        """L and S, (out, r), in float32 at least: a decomposition has no half precision."""
        P = p.deft_P.to(torch.promote_types(p.deft_P.dtype, torch.float32))
        if p.cfg.decomposition_method == "relu":
            return P, torch.relu(P)
        Q = torch.linalg.qr(P)[0]
        return Q, Q

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        L, S = self.subspace(p)
        W = p.site.weight()
        A = -(S.to(W.dtype).mT @ W).to(S.dtype)
        if not p.cfg.para:
            A = A + p.deft_R * self.content(p)
        dtype = p.dtype or A.dtype
        return L.to(dtype), A.to(dtype)
