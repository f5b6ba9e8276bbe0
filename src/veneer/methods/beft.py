"""BEFT: bias-efficient fine-tuning, a trained vector added to a layer's output. Huang et al. 2025,
arXiv:2509.15974, section 3.

    y = W x + b + v

    beft_bias (1, out)    starts at zero

Merges into the bias; a layer without one gets it. Beyond peft: transformers' Conv1D, convolutions, and merging
into layers without a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..kinds import Additive, Spec
from ..site import Site
from ..view import View


@dataclass
class BeftConfig(AdapterConfig):
    """init_weights: False draws the vector at random, for tests."""

    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BEFT"


class BEFT(Additive):
    Config = BeftConfig
    sites = frozenset({"linear", "conv"})
    prefix = "beft_"
    defaults = "beft"

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {"beft_bias": Spec((1, site.out))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        v = p.beft_bias
        p.fill("beft_bias", torch.zeros_like(v) if cfg.init_weights else torch.randn_like(v))
        return None

    def bias_delta(self, p: View) -> Tensor:
        return p.beft_bias.flatten() * p.scaling

    def delta(self, p: View) -> Tensor:
        return p.beft_bias.new_zeros(p.site.out, p.site.inp // p.site.groups, *p.site.kernel)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        y = base(x, *args, **kwargs)
        for p in ps:
            y = y + p.site.per_feature(self.bias_delta(p)).to(y.dtype)
        return y
