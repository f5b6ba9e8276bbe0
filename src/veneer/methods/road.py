"""RoAd: pairs of output features are rotated and scaled. Liao and Monz 2024, arXiv:2409.00119, section 3.

    y = R (W x + b);   a pair (y_j, y_j+h) becomes (c_1 y_j - s_1 y_j+h,  s_2 y_j + c_2 y_j+h),
    c = alpha cos(theta),  s = alpha sin(theta)

    road_theta, road_alpha (n,)    start at zero and at one; n = out / 2 (road_1), out (road_2), 2 out (road_4)

In each run of group_size features the first half is paired with the second, h = group_size / 2. road_1: one alpha
and theta a pair; road_2: one for each of its features; road_4: one for each of c_1, s_1, s_2, c_2.
An elementwise product, with adapters acting in the order they were added. Merges. Beyond peft: transformers'
Conv1D, convolutions, embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..errors import AdapterError
from ..kinds import Gate, Spec
from ..site import Site
from ..view import View

# In each variant: how many numbers a pair has, and which of them c_1, s_1, s_2 and c_2 read.
VARIANTS = {"road_1": (1, (0, 0, 0, 0)), "road_2": (2, (0, 0, 1, 1)), "road_4": (4, (0, 2, 3, 1))}


@dataclass
class RoadConfig(AdapterConfig):
    """variant: "road_1", "road_2" or "road_4". group_size: even, and a divisor of the layer's outputs.

    It says which features are paired, not how many numbers are trained. init_weights: False draws at random, for
    tests.
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "ROAD"
        self.variant = str(getattr(self.variant, "value", self.variant))
        if self.variant not in VARIANTS:
            raise ValueError(f"Invalid variant {self.variant!r}; choose one of {', '.join(VARIANTS)}")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(
                f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}. It pairs the "
                "halves of each run of features, so it must be positive and even"
            )


class RoAd(Gate):
    Config = RoadConfig
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "road_"

    def check(self, cfg: Any, site: Site) -> None:
        if site.out % cfg.group_size:
            raise AdapterError(
                f"The out_features of the base layer must be divisible by group_size ({cfg.group_size}) when using "
                f"RoadLayer. {site!r} has {site.out}"
            )
        if site.out // site.groups % cfg.group_size:
            raise AdapterError(
                f"{site!r}: group_size={cfg.group_size} pairs outputs of different groups, {site.out // site.groups} "
                "outputs each, which no weight of the layer's shape can do; choose a divisor of that"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        n = site.out // 2 * VARIANTS[cfg.variant][0]
        return {"road_theta": Spec((n,)), "road_alpha": Spec((n,))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        theta, alpha = p.road_theta, p.road_alpha
        p.fill("road_theta", torch.zeros_like(theta) if cfg.init_weights else 0.5 * torch.randn_like(theta))
        p.fill("road_alpha", torch.ones_like(alpha) if cfg.init_weights else 1 + 0.5 * torch.randn_like(alpha))
        return None

    def post(self, p: View, y: Tensor) -> Tensor:
        half = p.cfg.group_size // 2
        n, (c1, s1, s2, c2) = VARIANTS[p.cfg.variant]
        cos = (p.road_alpha * p.road_theta.cos()).unflatten(-1, (-1, n, half))
        sin = (p.road_alpha * p.road_theta.sin()).unflatten(-1, (-1, n, half))
        own = torch.stack((cos[:, c1], cos[:, c2]), 1)
        other = torch.stack((-sin[:, s1], sin[:, s2]), 1)
        pairs = y.unflatten(-1, (-1, 2, half))
        return torch.addcmul(pairs * own, pairs.flip(-2), other).flatten(-3)
