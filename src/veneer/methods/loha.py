"""LoHa: the change is the elementwise product of two low-rank matrices.
Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2; Yeh et al. 2023, arXiv:2309.14859, section 3.

    W' = W + (alpha / r) (w1_a w1_b) * (w2_a w2_b)

    hada_w1_a, hada_w2_a (out, r)       hada_w1_b, hada_w2_b (r, inp / groups * kernel sizes)

Convolutions with use_effective_conv2d, where the kernel is larger than 1: each product is a Tucker form with
a core of its own, sum_ij t[i, j, k] w_a[i, o] w_b[j, c]:

    hada_t1, hada_t2 (r, r, *kernel)   hada_w1_a, hada_w2_a (r, out)   hada_w1_b, hada_w2_b (r, inp / groups)

Merges. rank_dropout leaves out rows of the change in training and scales up the rest; where it takes all, the
change is zero (peft: NaN). Beyond peft: three-dimensional convolutions, transformers' Conv1D and embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..hadamard_kernels import hadamard
from ..kinds import Additive, Spec, Weights
from ..site import Site
from ..view import View


@dataclass
class LoHaConfig(AdapterConfig):
    """r: rank of each factor, so the change has a rank up to r * r. alpha: the change is scaled by alpha / r.

    rank_dropout: chance that an output feature is left out of the change in training. module_dropout: chance
    that the whole change is. use_effective_conv2d: Tucker form on convolutions. rank_pattern, alpha_pattern:
    {layer name or regex: value}. init_weights: False draws all factors at random, for tests.
    """

    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LOHA"


def _effective(cfg: LoHaConfig, site: Site) -> bool:
    return cfg.use_effective_conv2d and math.prod(site.kernel) > 1


class LoHa(Additive):
    Config = LoHaConfig
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "hada_"
    by_weight = True

    def dense(self, p: View) -> bool:
        return not (p.training and (p.cfg.rank_dropout or p.cfg.module_dropout))

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        r, inp = cfg.r, site.inp // site.groups
        if not _effective(cfg, site):
            columns = inp * math.prod(site.kernel)
            shapes: dict[str, tuple[int, ...]] = {"w{}_a": (site.out, r), "w{}_b": (r, columns)}
        else:
            core = (*site.kernel, 1) if len(site.kernel) == 1 else site.kernel  # files hold two dimensions
            shapes = {"w{}_a": (r, site.out), "w{}_b": (r, inp), "t{}": (r, r, *core)}
        return {"hada_" + name.format(i): Spec(shape) for i in (1, 2) for name, shape in shapes.items()}

    def scaling(self, cfg: Any) -> float:
        return cfg.alpha / cfg.r

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in p.where:
            value = torch.zeros_like(getattr(p, key), dtype=torch.float32)
            if key != "hada_w2_b" or not cfg.init_weights:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            p.fill(key, value)
        return None

    def delta(self, p: View) -> Tensor:
        first, second = self.product(p, 1), self.product(p, 2)
        shape = (p.site.out, p.site.inp // p.site.groups, *p.site.kernel)
        return (first * second * p.scaling).reshape(shape)

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        if any(_effective(p.cfg, p.site) for p in ps):
            return super().merged(ps, W, b)
        for p in ps:
            factors = (p.hada_w1_a, p.hada_w1_b, p.hada_w2_a, p.hada_w2_b)
            W = hadamard(W.flatten(1), *factors, p.scaling).reshape(W.shape)
        return W, b

    def product(self, p: View, i: int) -> Tensor:
        """One of the two low-rank factors of the change."""
        a, b = getattr(p, f"hada_w{i}_a"), getattr(p, f"hada_w{i}_b")
        if not _effective(p.cfg, p.site):
            return a @ b
        return torch.einsum("ij...,io,jc->oc...", getattr(p, f"hada_t{i}"), a, b)

    def side(self, p: View, x: Tensor) -> Tensor:
        delta = self.delta(p)
        if p.training and p.cfg.rank_dropout:
            keep = (torch.rand(len(delta), device=delta.device) >= p.cfg.rank_dropout).to(delta.dtype)
            keep = keep / keep.mean().clamp(min=1 / len(delta))
            delta = delta * keep.reshape(-1, *[1] * (delta.dim() - 1))
        if p.training and p.cfg.module_dropout:
            delta = delta * (torch.rand((), device=delta.device) >= p.cfg.module_dropout).to(delta.dtype)
        return p.site.op(x, delta, None)
