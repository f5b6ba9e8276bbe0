"""Lily: low-rank experts that layers share, mixed by a router. Zhong and Zhou 2024, arXiv:2407.09946, section 3.

    y = W x + scaling * P A x,   P = sum_e p_e B_e,   p = mean over tokens of softmax(R A x)

    lily_A.weight (r, inp)           one for stride_A layers in a row
    lily_B.weight (num_B * r, out)   the num_B experts, one under the other; one set for all layers
    lily_router.weight (num_B, r)    R, each layer's own

Layers share where one entry of target_modules names them and their sizes are equal. The mean runs over all tokens that
the layer sees in a call, so the rows of a batch, padding and, in cached generation, the steps bear on it: there is no
weight to merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..kinds import Routed, Spec
from ..site import Site
from ..view import View


@dataclass
class LilyConfig(AdapterConfig):
    """r: rank. stride_A: layers in a row that hold one A. num_B: experts, at least 2. scaling: of the change.

    init_weights: False draws B as well, for tests.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LILY"


class Lily(Routed):
    Config = LilyConfig
    prefix = "lily_"
    exempt: ClassVar[dict[str, str]] = {
        "forward == merged": "the experts' weights depend on the input, so no single weight is the forward's",
    }

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
        if cfg.stride_A < 1:
            raise ValueError(f"`stride_A` must be at least 1. ({site!r}: {cfg.stride_A})")
        if cfg.num_B < 2:
            raise ValueError(f"`num_B` must be at least 2 for the router to be trained. ({site!r}: {cfg.num_B})")

    def ties(self, cfg: Any) -> dict[str, int | None]:
        return {"lily_A": cfg.stride_A, "lily_B": None}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {
            "lily_A.weight": Spec((cfg.r, site.inp), like="linear"),
            "lily_B.weight": Spec((cfg.num_B * cfg.r, site.out), like="linear"),
            "lily_router.weight": Spec((cfg.num_B, cfg.r), like="linear"),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in ("lily_A", "lily_B", "lily_router"):
            t = getattr(p, key)
            bound = 0.0 if key == "lily_B" and cfg.init_weights else 1 / math.sqrt(t.shape[1])
            p.fill(key, torch.empty_like(t).uniform_(-bound, bound))
        return None

    def scaling(self, cfg: Any) -> float:
        return cfg.scaling

    def side(self, p: View, x: Tensor) -> Tensor:
        h = p.site.down(x, p.lily_A)
        share = torch.softmax(p.site.down(h, p.lily_router), -1).reshape(-1, p.cfg.num_B).mean(0)
        mixed = share @ p.lily_B.reshape(p.cfg.num_B, -1)
        return h @ (mixed.reshape(p.cfg.r, -1) * p.scaling)
