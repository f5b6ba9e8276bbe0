"""DeLoRA: a low-rank change of bounded strength, its direction and its strength trained apart.
Bini et al. 2025, arXiv:2503.18225, section 3.2.

    y = W x + (lambda / r) B D A (w * x),   D = diag(1 / (|a_i| |b_i|)),   w_j = |W[:, j]|

    delora_A (r, inp)      rows a_i
    delora_B (out, r)      columns b_i; starts at zero
    delora_lambda (1,)     strength, starts at the config's delora_lambda
    delora_w_norm (inp,)   frozen, the norms of the base's columns, stored in the file

Norms are at least 1e-4. Merges. Beyond peft: transformers' Conv1D and embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View


@dataclass
class DeloraConfig(AdapterConfig):
    """r: rank. delora_lambda: first value of the strength, a bound on the change's norm relative to the base's.

    module_dropout: dropout on the adapter's input. bias: "none", "all" or "delora_only". rank_pattern,
    lambda_pattern: {layer name or regex: value}. init_weights: False draws B at random too, for tests.
    """

    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: dict | None = field(default_factory=dict)
    lambda_pattern: dict | None = field(default_factory=dict)
    PATTERNS: ClassVar = (("rank_pattern", "r"), ("lambda_pattern", "delora_lambda"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "DELORA"


class DeLoRA(LowRank):
    Config = DeloraConfig
    sites = frozenset({"linear", "embedding"})
    prefix = "delora_"
    dropout = "module_dropout"

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` must be a positive integer; got {cfg.r} ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {
            "delora_A": Spec((cfg.r, site.inp)),
            "delora_B": Spec((site.out, cfg.r)),
            "delora_lambda": Spec((1,)),
            "delora_w_norm": Spec((site.inp,), train=False),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in ("delora_A", "delora_B"):
            value = torch.empty_like(getattr(p, key), dtype=torch.float32)
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            p.fill(key, value * 0 if key == "delora_B" and cfg.init_weights else value)
        p.fill("delora_lambda", torch.full_like(p.delora_lambda, float(cfg.delora_lambda)))
        p.fill("delora_w_norm", weight().float().norm(dim=0))
        return None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        A, B = p.delora_A, p.delora_B
        lengths = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
        return B * (p.delora_lambda / p.cfg.r / lengths), A * p.delora_w_norm
