"""TinyLoRA: a handful of trained numbers mix frozen random matrices inside the weight's principal subspace.
arXiv:2602.04118, section 3.

    y = W x + B (sum_i v_i P_i) A x,   B A = the top r of W's singular value decomposition, roots of the values in both

    base_model.tinylora_v.<group> (u,)   trained, one for a group of layers; starts at zero
    tinylora_A (r, inp), tinylora_B (out, r)   frozen, in the file; (r, width), (rows, r) on an embedding
    tinylora_P (u, r, r)                       frozen, normal / sqrt(r) from projection_seed + the layer's place

r is at most the layer's smaller size. weight_tying: 0, each layer has numbers of its own; 1, all layers share them.
Merges. init_weights=False and unknown words draw v, where peft leaves its memory as it finds it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..int8 import int8_weight
from ..kernels import low_rank_onto, mask_like
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View


@dataclass
class TinyLoraConfig(AdapterConfig):
    """r: size of the subspace. u: trained numbers in a group. weight_tying: from 0.0 (a group a layer) to 1.0 (one
    group). projection_seed, save_projection: the random matrices' seed, and whether the file holds them.

    tinylora_dropout: on the adapter's input. bias: "none", "all" or "tinylora_only". init_weights: True starts at
    zero; "uniform" and False within init_v_bound.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "TINYLORA"
        if not 0.0 <= self.weight_tying <= 1.0:
            raise ValueError(
                f"`weight_tying` should be a float between 0.0 and 1.0 but the value passed is {self.weight_tying}"
            )


def groups(layers: int, weight_tying: float) -> int:
    """How many groups share a vector."""
    return max(1, round(layers * (1 - weight_tying)))


class TinyLoRA(LowRank):
    Config = TinyLoraConfig
    sites = frozenset({"linear", "embedding"})
    prefix = "tinylora_"
    dropout = "tinylora_dropout"

    def check(self, cfg: Any, site: Site) -> None:
        for key in ("r", "u"):
            if getattr(cfg, key) <= 0:
                raise ValueError(
                    f"`{key}` should be a positive integer value but the value passed is {getattr(cfg, key)} ({site!r})"
                )

    def by_place(self, cfgs: Sequence[Any], sites: Sequence[Site]) -> Sequence[Any]:
        made, n = [], len(cfgs)
        for i, cfg in enumerate(cfgs):
            own, k = copy.copy(cfg), groups(n, cfg.weight_tying)
            own.place, own.group = i, min(i // (n // k), k - 1)
            made.append(own)
        return made

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        start = 0.0 if cfg.init_weights is True else abs(cfg.init_v_bound)
        n = groups(len(sites), cfg.weight_tying)
        return {f"tinylora_v.{i}": Spec((cfg.u,), value=torch.empty(cfg.u).uniform_(-start, start)) for i in range(n)}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        r = min(cfg.r, site.out, site.inp)
        out, inp = (site.inp, site.out) if site.kind == "embedding" else (site.out, site.inp)
        return {
            "tinylora_A": Spec((r, inp), train=False),
            "tinylora_B": Spec((out, r), train=False),
            "tinylora_P": Spec((cfg.u, r, r), train=False, save=cfg.save_projection),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        r, W = len(p.tinylora_A), weight().float()
        U, S, Vh = torch.linalg.svd(W.mT if p.site.kind == "embedding" else W, full_matrices=False)
        p.fill("tinylora_A", S[:r].sqrt()[:, None] * Vh[:r])
        p.fill("tinylora_B", U[:, :r] * S[:r].sqrt())
        self.restore(p, cfg, weight)
        return None

    def restore(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        """The random matrices; a file that holds them overwrites these."""
        if p.tinylora_P.is_meta:
            return
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_seed + cfg.place)
        p.fill("tinylora_P", torch.randn(p.tinylora_P.shape, generator=generator) * (1 / math.sqrt(len(p.tinylora_A))))

    def mix(self, p: View) -> Tensor:
        """(r, r): the trained numbers' sum of random matrices."""
        v, P = getattr(p, f"tinylora_v_{p.cfg.group}"), p.tinylora_P
        return (v @ P.flatten(1)).reshape(P.shape[1:])

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        p = ps[0]
        usual = len(ps) == 1 and not args and not kwargs and p.dropout_rate < 1 and base.plain(x)
        if not usual or int8_weight(p.site.module) is not None:
            return super().forward(ps, x, base, args, kwargs)
        rate, A = p.dropout_rate, p.tinylora_A  # the small matrix acts on activations: no gradient of B's size
        h = F.linear(x * mask_like(x, rate), A) / (1 - rate) if rate else F.linear(x, A)
        return low_rank_onto(x, base.weight(), base.bias(), F.linear(h, self.mix(p)), p.tinylora_B, p.scaling)

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        mix = self.mix(p)
        if p.site.kind == "embedding":
            return p.tinylora_A.mT, mix.mT @ p.tinylora_B.mT
        return p.tinylora_B @ mix, p.tinylora_A
