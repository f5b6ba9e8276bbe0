"""HiRA: the change is the weight times a low-rank matrix, element by element, so its rank is not bounded by r.
Huang et al. 2025, ICLR, OpenReview TwJrTz9cRS, section 3.

    W' = W + W * (B A)

    hira_A (r, inp)              hira_B (out, r), starts at zero
    hira_A (r, inp, *kernel)     hira_B (out, r, 1, ...)            convolutions
    hira_embedding_A (r, rows)   starts at zero; hira_embedding_B (width, r)

Merges. An embedding's change is looked up, never formed for the whole table. Beyond peft: convolutions with groups
or padding modes other than zeros.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import AdapterError
from ..hadamard_kernels import modulated
from ..kinds import Additive, Spec, Weights
from ..site import Site
from ..view import View


@dataclass
class HiraConfig(AdapterConfig):
    """r: rank of the factor. hira_dropout: on the adapter's input. rank_pattern: part of the file format, without
    effect there, and so here; a warning says it.

    init_weights: True (kaiming), "gaussian", or False: both factors at random, for tests.
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict | None = field(default_factory=dict)

    PATTERNS = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "HIRA"
        if self.rank_pattern:
            warnings.warn(
                f"HiRA's rank_pattern has no effect in files of this format: every layer has r={self.r}. For layers "
                "of another rank, add a second adapter",
                stacklevel=3,
            )


class HiRA(Additive):
    Config = HiraConfig
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "hira_"
    dropout = "hira_dropout"
    by_weight = True

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
        way = cfg.init_weights
        if way not in (True, False, None) and str(way).lower() != "gaussian":
            raise AdapterError(f"Unknown initialization init_weights={way!r}: use True, False or 'gaussian'")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        key = "hira_embedding_" if site.kind == "embedding" else "hira_"
        one = tuple(1 for _ in site.kernel)
        down = (cfg.r, site.inp // site.groups, *site.kernel)
        return {f"{key}A": Spec(down), f"{key}B": Spec((site.out, cfg.r, *one))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        rest, zero = reversed(p.where) if p.site.kind == "embedding" else p.where
        value = torch.empty_like(getattr(p, rest), dtype=torch.float32)
        if cfg.init_weights is False or p.site.kind == "embedding":
            nn.init.normal_(value)
        elif str(cfg.init_weights).lower() == "gaussian":
            nn.init.normal_(value, std=1 / cfg.r)
        else:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        p.fill(rest, value)
        last = getattr(p, zero)
        p.fill(zero, torch.randn_like(last) if cfg.init_weights is False else torch.zeros_like(last))
        return None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        return (p.hira_embedding_B, p.hira_embedding_A) if p.site.kind == "embedding" else (p.hira_B, p.hira_A)

    def delta(self, p: View) -> Tensor:
        (B, A), W = self.factors(p), p.site.weight()
        return W.to(A.dtype) * (B.flatten(1) @ A.flatten(1) * p.scaling).reshape(W.shape)

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        for p in ps:
            (B, A), M = self.factors(p), p.site.weight()
            new = modulated(W.flatten(1), M.to(A.dtype).flatten(1), B.flatten(1), A.flatten(1), None, None, p.scaling)
            W = new.reshape(W.shape)
        return W, b

    def side(self, p: View, x: Tensor) -> Tensor:
        if p.site.kind != "embedding":
            return p.site.op(x, self.delta(p), None)
        B, A = self.factors(p)
        y = p.site.op(x, p.site.weight(), None)
        return y * (F.embedding(x, A.T) @ B.mT * p.scaling).to(y.dtype)
