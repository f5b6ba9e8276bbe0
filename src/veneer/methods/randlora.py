"""RandLoRA: a full-rank change from a sum of frozen random products with trained scales.
Albert et al. 2025, arXiv:2502.00987, section 4.1.

    y = W x + (alpha / r) sum_k B_k lambda_k A_k diag(gamma_k) x,   k over r * n pairs, n = ceil(min(inp, out) / r)

    randlora_lambda (r, n)                       starts at zero
    randlora_gamma  (n, min(inp, out))           starts at 1 / max(inp, out)
    base_model.randlora_A (r, 1, min size)       frozen, one for all layers
    base_model.randlora_B (max size, n, r)       frozen, one for all layers

Pairs as files have them: A's by (rank, base), B's by (base, rank), both counted row by row.

min and max size are those of the largest inp and out over all layers; a layer reads the first entries it needs.
Where out < inp the product is the transposed one. Both bases follow from projection_prng_key, drawn in bfloat16
(dense) or float32 (sparse: signs with two thirds zeros; very_sparse: 1 - 1 / sqrt(min size) zeros), and scaled to a
standard deviation of one. Merges. Files of peft repeat both bases in each layer; those copies are read over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..config import AdapterConfig, veneer_field
from ..kernels import plain_autograd
from ..kinds import LowRank, Spec
from ..remade import remember
from ..site import Site
from ..view import View
from .vera import _rounded


@dataclass
class RandLoraConfig(AdapterConfig):
    """r: rank of each random base; the smaller, the more trained numbers. randlora_alpha: the change is scaled by
    randlora_alpha / r. projection_prng_key: the bases' seed. save_projection: put them into the file.

    sparse, very_sparse: ternary bases (very_sparse wins). randlora_dropout: on the adapter's input. bias: "none",
    "all" or "randlora_only". init_weights: False draws randlora_lambda at random, for tests.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "RANDLORA"


def _dense(pieces: Sequence[tuple[int, ...]], generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(fan in), joined along the second axis, standard deviation one; all in bfloat16."""
    drawn = []
    for shape in pieces:
        bound = 1 / math.sqrt(shape[1] * shape[2])
        drawn.append(torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator))
    base = torch.cat(drawn, dim=1)
    return base / base.std()


def _ternary(shape: tuple[int, ...], s: float, generator: torch.Generator) -> Tensor:
    """-1 and 1 with probability 1 / (2 s) each, else 0; standard deviation one."""
    u = torch.rand(shape, generator=generator)
    signs = (u > 1 - 1 / (2 * s)).float() - (u < 1 / (2 * s)).float()
    return signs / signs.std()


def scaled_bases_reference(lam: Tensor, A: Tensor, gamma: Tensor) -> Tensor:
    """lam (r, n), A (r, 1, low), gamma (n, low) -> (r, n, low)"""
    return lam[:, :, None] * A * gamma


def scaled_bases(lam: Tensor, A: Tensor, gamma: Tensor) -> Tensor:
    """scaled_bases_reference; where A is frozen, as one autograd node that keeps nothing of the product's size."""
    if A.requires_grad or not lam.dtype == A.dtype == gamma.dtype or not plain_autograd(lam):
        return scaled_bases_reference(lam, A, gamma)
    return _ScaledBases.apply(lam, A, gamma)  # type: ignore[no-any-return]


def _made(lam: Tensor, A: Tensor, gamma: Tensor) -> Tensor:
    return (A * lam[:, :, None]).mul_(gamma)


def _shaped(transposed: bool, made: Tensor) -> Tensor:
    """(r * n, low), or its transpose"""
    return made.flatten(0, 1).mT if transposed else made.flatten(0, 1)


class _ScaledBases(Function):
    @staticmethod
    def forward(ctx: Any, lam: Tensor, A: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(lam, A, gamma)
        return _made(lam, A, gamma)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        lam, A, gamma = ctx.saved_tensors
        read = (g * A).transpose(0, 1)  # (n, r, low)
        glam = torch.bmm(read, gamma[:, :, None])[..., 0].mT
        return glam, None, torch.bmm(lam.mT[:, None], read)[:, 0]


class RandLoRA(LowRank):
    Config = RandLoraConfig
    prefix = "randlora_"
    dropout = "randlora_dropout"
    settings: ClassVar[frozenset[str]] = frozenset({"randlora_alpha"})

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        out, inp = max(s.out for s in sites), max(s.inp for s in sites)
        low, high, n = min(out, inp), max(out, inp), -(-min(out, inp) // cfg.r)
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        if cfg.sparse or cfg.very_sparse:
            s = math.sqrt(low) if cfg.very_sparse else 3.0
            A = _ternary((cfg.r, 1, low), s, generator)
            B = _ternary((high, n, cfg.r), s, generator)
        else:
            A = _dense([(cfg.r, 1, low)], generator).float()
            B = _dense([(high, 1, cfg.r)] * n, generator).float()
        drawn = {"randlora_A": _rounded(A, sites), "randlora_B": _rounded(B, sites)}
        return {k: Spec(tuple(v.shape), train=False, save=cfg.save_projection, value=v) for k, v in drawn.items()}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        low = min(site.out, site.inp)
        n = -(-low // cfg.r)
        return {"randlora_lambda": Spec((cfg.r, n)), "randlora_gamma": Spec((n, low))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        lam, gamma = p.randlora_lambda, p.randlora_gamma
        p.fill("randlora_lambda", torch.zeros_like(lam) if cfg.init_weights else torch.randn_like(lam))
        p.fill("randlora_gamma", torch.full_like(gamma, 1 / max(p.site.out, p.site.inp)))
        return None

    def scaling(self, cfg: Any) -> float:
        return cfg.randlora_alpha / cfg.r

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        low, high, n = min(p.site.out, p.site.inp), max(p.site.out, p.site.inp), p.randlora_lambda.shape[1]
        wide, sources = p.site.inp > p.site.out, (p.randlora_lambda, p.randlora_A[:, :, :low], p.randlora_gamma)
        shaped = partial(_shaped, wide)
        small, large = shaped(scaled_bases(*sources)), p.randlora_B[:high, :n].flatten(1)  # large (high, n * r)
        if plain_autograd(small):
            small = remember(small, lambda *t: shaped(_made(*t)), *sources)
        return (small, large.mT) if wide else (large, small)

    def from_disk(self, cfg: Any, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Without the copies of the shared bases that a file of peft holds for each layer."""
        copied = re.compile(r"^(?!base_model\.randlora_[AB]$).*\.randlora_[AB]$")
        return {k: t for k, t in tensors.items() if not copied.match(k)}
