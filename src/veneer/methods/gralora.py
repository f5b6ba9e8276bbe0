"""GraLoRA: granular low-rank adaptation, a small LoRA for each of k x k blocks of the weight. Jung et al. 2025,
arXiv:2505.20355, section 3.2; the hybrid form, section 3.4.

    y_j = (W x)_j + s (sum_n B_jn A_jn x_n + (B_g A_g x)_j),   s = alpha / (r + hybrid_r),   j, n = 1 ... k

    gralora_A (k, inp / k, r)    A_jn: of block n, the j-th r / k columns
    gralora_B (k, r, out / k)    B_jn: of block j, the n-th r / k rows; starts at zero
    gralora_A_general.weight (hybrid_r, inp), gralora_B_general.weight (out, hybrid_r)    with hybrid_r > 0

Merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig, veneer_field
from ..kinds import Additive, Spec
from ..site import Site
from ..view import View


@dataclass
class GraloraConfig(AdapterConfig):
    """r: rank of one row of blocks together, a multiple of gralora_k. gralora_k: blocks a side. hybrid_r: rank of an
    ordinary LoRA beside them, 0 for none. alpha: the change is scaled by alpha / (r + hybrid_r).

    gralora_dropout: on the adapter's input. bias: "none", "all" or "gralora_only". init_weights: False draws
    the B matrices at random, too, for tests.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "GRALORA"
        if self.gralora_k <= 0:
            raise ValueError(f"`gralora_k` should be a positive integer value but the value passed is {self.gralora_k}")
        if self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")


class GraLoRA(Additive):
    Config = GraloraConfig
    prefix = "gralora_"
    dropout = "gralora_dropout"

    def check(self, cfg: Any, site: Site) -> None:
        for key, least in (("r", "positive"), ("gralora_k", "positive"), ("hybrid_r", "non-negative")):
            value = getattr(cfg, key)
            if value < 0 or (value == 0 and least == "positive"):
                said = f"`{key}` should be a {least} integer value but the value passed is {value}"
                raise ValueError(f"{said} ({site!r})")
        for name, size in (("in_features", site.inp), ("out_features", site.out)):
            if size % cfg.gralora_k:
                said = f"{name} should be divisible by gralora_k, but got {size} and {cfg.gralora_k}"
                raise ValueError(f"{said} ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        k, r = cfg.gralora_k, cfg.r
        specs = {"gralora_A": Spec((k, site.inp // k, r)), "gralora_B": Spec((k, r, site.out // k))}
        if cfg.hybrid_r:
            specs["gralora_A_general.weight"] = Spec((cfg.hybrid_r, site.inp), like="linear")
            specs["gralora_B_general.weight"] = Spec((site.out, cfg.hybrid_r), like="linear")
        return specs

    def scaling(self, cfg: Any) -> float:
        return cfg.alpha / (cfg.r + cfg.hybrid_r)

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in p.where:
            value = torch.zeros_like(getattr(p, key), dtype=torch.float32)
            if "_A" in key or not cfg.init_weights:
                for matrix in [value] if "general" in key else [block.T for block in value]:
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            p.fill(key, value)
        return None

    def side(self, p: View, x: Tensor) -> Tensor:
        A, B, k = p.gralora_A, p.gralora_B * p.scaling, p.cfg.gralora_k
        flat = x.reshape(-1, k, A.shape[1]).transpose(0, 1)
        h = torch.bmm(flat, A)  # (n, tokens, r): r as j, r / k
        h = h.unflatten(-1, (k, -1)).permute(2, 1, 0, 3).flatten(2)  # (j, tokens, r): r as n, r / k
        y = torch.bmm(h, B).transpose(0, 1).reshape(*x.shape[:-1], -1)
        if p.cfg.hybrid_r:
            y = y + F.linear(F.linear(x, p.gralora_A_general), p.gralora_B_general * p.scaling)
        return y

    def delta(self, p: View) -> Tensor:
        A, B, k = p.gralora_A, p.gralora_B * p.scaling, p.cfg.gralora_k
        A, B = A.unflatten(-1, (k, -1)), B.unflatten(1, (k, -1))  # n, i, j, c   and   j, n, c, o
        change = torch.einsum("nijc,jnco->joni", A, B).reshape(p.site.out, p.site.inp)
        if p.cfg.hybrid_r:
            change = change + p.gralora_B_general * p.scaling @ p.gralora_A_general
        return change
