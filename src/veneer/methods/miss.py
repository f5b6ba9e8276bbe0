"""MiSS: one small matrix, repeated along the input, is the change. Kang & Yin 2024, arXiv:2409.15371, section 3;
"bat", section 3.3 there, is the form that its first version calls Bone.

    y = W x + M^T sum_i x_i              x cut into blocks of r, the last one filled with zeros
    W' = W + (W_oi B_o + B_o)_oi         bat: W cut into blocks W_oi (r, r)

    miss_block (r, out)           starts at zero
    miss_block (r, mini_r)        init_weights="mini": M is that, repeated along the output
    miss_block (out / r, r, r)    init_weights="bat": B, for layers whose two sizes r divides

Merges. Several active bat adapters act one after the other. Departures from peft: miss_dropout acts in bat, too;
adapters of different variants may stand side by side on one layer; transformers' Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig
from ..kinds import Additive, Reweight, Spec
from ..site import Site
from ..view import View


@dataclass
class MissConfig(AdapterConfig):
    """r: size of a block. miss_dropout: on the adapter's input. bias: "none", "all" or "miss_only".

    init_weights: True, "bat", "mini", or False, which draws the block at random, for tests. mini_r: with
    "mini", how many output features the block has; it divides the layer's.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MISS"
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ValueError(f"Unknown init_weights: {self.init_weights!r}; one of True, False, 'bat', 'mini'")


def _check(cfg: MissConfig, site: Site) -> None:
    if cfg.r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
    if cfg.r > site.inp:
        raise ValueError(f"`r` ({cfg.r}) must be less than or equal to in_features ({site.inp}) ({site!r})")
    if cfg.init_weights == "mini" and (cfg.mini_r <= 0 or site.out % cfg.mini_r):
        raise ValueError(f"mini_r={cfg.mini_r} does not divide the {site.out} output features of {site!r}")
    if cfg.init_weights == "bat" and (site.inp % cfg.r or site.out % cfg.r):
        raise ValueError(
            f"init_weights='bat' cuts the weight into [r, r] blocks, and r={cfg.r} does not divide both sizes of "
            f"{site!r}; choose an r that does, or another init_weights"
        )


def _init(p: View, cfg: MissConfig) -> None:
    value = torch.zeros_like(p.miss_block, dtype=torch.float32)
    if not cfg.init_weights:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    p.fill("miss_block", value)


class MiSS(Additive):
    Config = MissConfig
    prefix = "miss_"
    dropout = "miss_dropout"

    def variant(self, cfg: Any) -> str | None:
        return "MISS_BAT" if cfg.init_weights == "bat" else None

    def check(self, cfg: Any, site: Site) -> None:
        _check(cfg, site)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {"miss_block": Spec((cfg.r, cfg.mini_r if cfg.init_weights == "mini" else site.out))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        _init(p, cfg)
        return None

    def block(self, p: View) -> Tensor:
        """(out, r)"""
        M = p.miss_block
        times = p.site.out // M.shape[1]
        return M.mT if times == 1 else M.mT.repeat(times, 1)

    def gathered(self, p: View, x: Tensor) -> Tensor:
        """The sum of the input's blocks, (..., r)."""
        short = -x.shape[-1] % p.cfg.r
        return (F.pad(x, (0, short)) if short else x).unflatten(-1, (-1, p.cfg.r)).sum(-2)

    def side(self, p: View, x: Tensor) -> Tensor:
        return F.linear(self.gathered(p, x), self.block(p) * p.scaling)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        y = base(x, *args, **kwargs)
        for p in ps:
            y = p.site.accumulate(y, self.gathered(p, p.drop(x)), self.block(p), p.scaling)
        return y

    def delta(self, p: View) -> Tensor:
        times = -(-p.site.inp // p.cfg.r)
        return self.block(p).repeat(1, times)[:, : p.site.inp] * p.scaling


class MissBat(Reweight):
    Config = MissConfig
    example: ClassVar[dict[str, Any]] = {"init_weights": "bat"}
    prefix = "miss_"
    dropout = "miss_dropout"
    chained = True

    def check(self, cfg: Any, site: Site) -> None:
        _check(cfg, site)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {"miss_block": Spec((site.out // cfg.r, cfg.r, cfg.r))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        _init(p, cfg)
        return None

    def weight(self, p: View, W: Tensor) -> Tensor:
        B, (out, r, _) = p.miss_block * p.scaling, p.miss_block.shape
        rows = W.reshape(out, -1, r)  # block row o: its W_oi, one row of r numbers after the other
        change = torch.baddbmm(rows, rows, B).unflatten(1, (r, -1)) + B[:, :, None]
        return change.reshape(W.shape)
