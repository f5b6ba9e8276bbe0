"""LoKr: the change is a Kronecker product of a small matrix and a larger one, that one of low rank.
Edalati et al. 2022, arXiv:2212.10650, section 3; Yeh et al. 2023, arXiv:2309.14859, section 3.

    W' = W + (alpha / r) w1 (x) w2,   w1 (o1, i1), w2 (o2, i2, *kernel), o1 o2 = out, i1 i2 = inp / groups

    lokr_w1 (o1, i1)                    or lokr_w1_a (o1, r), lokr_w1_b (r, i1) with decompose_both
    lokr_w2 (o2, i2, *kernel)           or lokr_w2_a (o2, r), lokr_w2_b (r, i2 * kernel sizes)
    lokr_t2 (r, r, *kernel)             and lokr_w2_a (r, o2), lokr_w2_b (r, i2) with use_effective_conv2d

A factor is decomposed where r is less than half its larger size. On a linear layer y is w1 X w2^T, X being the
input as an (i1, i2) matrix; the product is never formed. On a one-dimensional convolution with a whole w2 the
product is w1[None] (x) w2 read as the weight's shape, as files have it. Merges. rank_dropout leaves out output
features in training; where it takes all, the change is zero. Beyond peft: transformers' Conv1D,
three-dimensional convolutions, embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig
from ..kinds import Additive, Spec
from ..site import Site
from ..view import View


@dataclass
class LoKrConfig(AdapterConfig):
    """r: rank of a decomposed factor. alpha: the change is scaled by alpha / r. decompose_factor: size of w1 where it
    divides the layer's; -1: as square as possible. decompose_both: decompose w1, too.

    rank_dropout: chance that an output feature is left out of the change in training; rank_dropout_scale: scale
    up the rest. module_dropout: chance that the whole change is left out. use_effective_conv2d: Tucker form on
    convolutions. rank_pattern, alpha_pattern: {layer name or regex: value}. init_weights: True (w1 zero),
    "lycoris" (w2 zero), False (all random, for tests).
    """

    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LOKR"
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"Unknown init_weights: {self.init_weights!r}; one of True, False, 'lycoris'")


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two factors of `size`: `factor` first where it divides; else the largest first one up to it that is no
    larger than the second. Any factor below 1 but -1 counts as 1."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(max(factor, 1), math.isqrt(size))
    first = max(d for d in range(1, most + 1) if size % d == 0)
    return first, size // first


class LoKr(Additive):
    Config = LoKrConfig
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "lokr_"

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        (o1, o2), (i1, i2) = (factorization(n, cfg.decompose_factor) for n in (site.out, site.inp // site.groups))
        r, kernel = cfg.r, site.kernel
        shapes: dict[str, tuple[int, ...]] = {"w1": (o1, i1)}
        if cfg.decompose_both and 2 * r < max(o1, i1):
            shapes = {"w1_a": (o1, r), "w1_b": (r, i1)}
        if 2 * r >= max(o2, i2):
            shapes |= {"w2": (o2, i2, *kernel)}
        elif cfg.use_effective_conv2d and math.prod(kernel) > 1:
            core = (*kernel, 1) if len(kernel) == 1 else kernel  # files hold two dimensions
            shapes |= {"w2_a": (r, o2), "w2_b": (r, i2), "t2": (r, r, *core)}
        else:
            shapes |= {"w2_a": (o2, r), "w2_b": (r, i2 * math.prod(kernel))}
        return {"lokr_" + name: Spec(shape) for name, shape in shapes.items()}

    def scaling(self, cfg: Any) -> float:
        return cfg.alpha / cfg.r

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[cfg.init_weights]
        for key in p.where:
            value = torch.zeros_like(getattr(p, key), dtype=torch.float32)
            if key not in zero:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            p.fill(key, value)
        return None

    def pair(self, p: View) -> tuple[Tensor, Tensor]:
        """w1 (o1, i1), w2 (o2, i2, *kernel)"""
        w1 = p.lokr_w1 if p.has("lokr_w1") else p.lokr_w1_a @ p.lokr_w1_b
        if p.has("lokr_w2"):
            w2 = p.lokr_w2
        elif p.has("lokr_t2"):
            w2 = torch.einsum("ij...,io,jc->oc...", p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b)
        else:
            w2 = p.lokr_w2_a @ p.lokr_w2_b
        i2 = p.site.inp // p.site.groups // w1.shape[1]
        return w1, w2.reshape(-1, i2, *p.site.kernel)

    def delta(self, p: View) -> Tensor:
        w1, w2 = self.pair(p)
        w1, kernel = w1 * p.scaling, p.site.kernel
        if len(kernel) == 1 and p.has("lokr_w2"):
            grid = w1[None, None, :, None, :, None] * w2[:, None, :, None, :]
        else:
            grid = w1[:, None, :, None].reshape(len(w1), 1, -1, 1, *[1] * len(kernel)) * w2[:, None]
        return grid.reshape(p.site.out, -1, *kernel)

    def side(self, p: View, x: Tensor) -> Tensor:
        y = self.product(p, x) if p.site.kind == "linear" else p.site.op(x, self.delta(p), None)
        if p.training and p.cfg.rank_dropout:
            keep = (torch.rand(p.site.out, device=y.device) >= p.cfg.rank_dropout).to(y.dtype)
            if p.cfg.rank_dropout_scale:
                keep = keep / keep.mean().clamp(min=1 / len(keep))
            y = y * p.site.per_feature(keep)
        if p.training and p.cfg.module_dropout:
            y = y * (torch.rand((), device=y.device) >= p.cfg.module_dropout).to(y.dtype)
        return y

    def product(self, p: View, x: Tensor) -> Tensor:
        """w1 X w2^T, the cheaper product first."""
        w1, w2 = self.pair(p)
        (o1, i1), (o2, i2) = w1.shape, w2.shape
        X, w1 = x.reshape(-1, i1, i2), w1 * p.scaling
        if o1 * i2 * (i1 + o2) < i1 * o2 * (i2 + o1):
            y = _right(_right(X.mT, w1).mT, w2)
        else:
            y = _right(_right(X, w2).mT, w1).mT
        return y.reshape(*x.shape[:-1], o1 * o2)


def _right(X: Tensor, w: Tensor) -> Tensor:
    """X w^T as one product of two matrices, for X (n, a, b)."""
    return F.linear(X.reshape(-1, X.shape[-1]), w).unflatten(0, (-1, X.shape[1]))
