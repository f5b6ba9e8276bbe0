"""OFT: orthogonal fine-tuning. Qiu et al. 2023, arXiv:2306.07280, section 3.2; on the input side, Qiu et al.
2025, arXiv:2506.19847.

    y = W R x + b,   R block-diagonal; with x as a row each block is x C, Q skew-symmetric:
    C = (I - Q)(I + Q)^-1,   or (I + Q)(I + Q + Q^2 + ...) with use_cayley_neumann

    oft_R.weight (blocks, b (b - 1) / 2)            the upper triangle of each Q, row by row; starts at zero
    oft_embedding_R.weight                          on an embedding, over its output features

The series goes up to Q^(n-1), n = num_cayley_neumann_terms; its C is near the transpose of the exact one, as
files have it.
On a convolution R acts on the unfolded patch (inp * kernel sizes), that is, on the rows of W.flatten(1).
The first active adapter acts first on x. Merges. Departures from peft: a convolution's forward pass is that
of its merged weight; groups, dilation, Conv1d, Conv3d and transformers' Conv1D work; module_dropout acts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..errors import AdapterError
from ..kernels import plain_autograd
from ..kinds import Gate, Spec
from ..oft_kernels import rotated
from ..site import Site
from ..view import View
from .boft import rotate_blocks


@dataclass
class OFTConfig(AdapterConfig):
    """oft_block_size: features a block rotates; r: number of blocks. Give one of them, the other 0.

    A size that does not divide a layer's features is replaced by the nearest that does. module_dropout: the
    chance that a block is left out in training. bias: "none", "all" or "oft_only". coft, eps: keep each Q
    within eps / sqrt(blocks). block_share: one block for all. init_weights: False draws at random, for tests.
    use_cayley_neumann, num_cayley_neumann_terms: a series instead of a linear solve.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OFT"
        if self.r == 0 and self.oft_block_size == 0:
            raise ValueError("Either `r` or `oft_block_size` must be non-zero; both are 0. Give one of them.")
        if self.r != 0 and self.oft_block_size != 0:
            raise ValueError(
                f"You can only specify either r ({self.r}) or oft_block_size ({self.oft_block_size}), "
                "but not both simultaneously: each follows from the other. Set the other to 0."
            )
        for key in ("r", "oft_block_size"):
            if getattr(self, key) < 0:
                raise ValueError(f"`{key}` must not be negative, got {getattr(self, key)}")


def block_size(cfg: OFTConfig, site: Site) -> tuple[int, int]:
    """(number of blocks, size of a block): what the config asks for, or the nearest that fits the layer."""
    features = site.out if site.kind == "embedding" else site.inp * math.prod(site.kernel)
    return _cut(features, features // site.groups, cfg.r, cfg.oft_block_size)


@lru_cache(maxsize=1024)
def _cut(features: int, within: int, blocks: int, size: int) -> tuple[int, int]:
    """A block does not reach over the `within` features of one group."""
    sizes = [b for b in range(1, within + 1) if within % b == 0]
    if blocks:
        size = min(sizes, key=lambda b: (abs(features // b - blocks), features // b))
    else:
        size = min(sizes, key=lambda b: (abs(b - size), b))
    return features // size, size


def skew(w: Tensor, size: int) -> Tensor:
    """(..., blocks, b (b - 1) / 2) -> skew-symmetric (..., blocks, b, b)."""
    i, j = torch.triu_indices(size, size, 1, device=w.device)
    flat = w.new_zeros(*w.shape[:-1], size * size).index_add(-1, i * size + j, w)
    Q = flat.unflatten(-1, (size, size))
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1, orthogonal."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """(I + Q)(I + Q + ... + Q^(terms - 2)), nearly orthogonal for small Q.

    As files have it, three terms count as four, two are I + 2 Q, and one is I.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms <= 2:
        return eye + 2 * Q if terms == 2 else eye
    series = eye + Q
    for _ in range(max(terms, 4) - 3):
        series = eye + Q @ series
    return series + Q @ series


class OFT(Gate):
    Config = OFTConfig
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "oft_"
    patches = True

    def check(self, cfg: Any, site: Site) -> None:
        blocks, size = block_size(cfg, site)
        if size == 1:
            raise AdapterError(
                f"{site!r}: its features are cut into blocks of one feature, which cannot rotate; choose "
                "another r or oft_block_size, or take the layer out of target_modules"
            )
        asked, got = (cfg.r, blocks) if cfg.r else (cfg.oft_block_size, size)
        if asked != got:
            name = "r" if cfg.r else "oft_block_size"
            said = f"{site!r}: {name}={asked} does not divide its features; using {name}={got}"
            warnings.warn(said, stacklevel=2)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        blocks, size = block_size(cfg, site)
        key = "oft_embedding_R" if site.kind == "embedding" else "oft_R"
        return {f"{key}.weight": Spec((1 if cfg.block_share else blocks, size * (size - 1) // 2), raw=True)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        (key,) = p.where
        like = getattr(p, key)
        p.fill(key, torch.zeros_like(like) if cfg.init_weights else 0.1 * torch.randn_like(like))
        return None

    def gates(self, p: View) -> tuple[bool, bool]:
        outside = p.site.kind == "embedding"
        return not outside, outside

    def rotation(self, p: View) -> Tensor:
        """C, (blocks or 1, b, b), in float32 at least: a solve has no half precision."""
        cfg = p.cfg
        _, size = block_size(cfg, p.site)
        w = self.constrained(p) if cfg.coft else self.stored(p)
        Q = skew(w.to(torch.promote_types(w.dtype, torch.float32)), size)
        C = cayley_neumann(Q, cfg.num_cayley_neumann_terms) if cfg.use_cayley_neumann else cayley(Q)
        if cfg.module_dropout and p.training and torch.is_grad_enabled():  # merging runs without gradients
            keep = torch.rand(len(C), 1, 1, device=C.device) >= cfg.module_dropout
            C = torch.where(keep, C, torch.eye(size, dtype=C.dtype, device=C.device))
        return C

    def stored(self, p: View) -> Tensor:
        return p.oft_embedding_R if p.site.kind == "embedding" else p.oft_R

    def constrained(self, p: View) -> Tensor:
        """COFT: each block's Q drawn back to a Frobenius norm of eps / sqrt(blocks); the gradient passes.

        In training the stored tensor itself is drawn back, so that the optimizer starts from there.
        """
        w, learns = self.stored(p), p.training and torch.is_grad_enabled()
        with torch.no_grad():
            norm = w.norm(dim=-1, keepdim=True) * math.sqrt(2.0)
            near = w * (p.cfg.eps / math.sqrt(len(w)) / norm.clamp(min=1e-30)).clamp(max=1.0)
            ((holder, leaf),) = p.where.values()
            if learns and getattr(holder, leaf) is w:  # a row's slice of a stack is not the stored tensor
                w.copy_(near)
        return w + (near - w).detach()

    def pre(self, p: View, x: Tensor) -> Tensor:
        if self.usual(p, x):
            return rotated(x, self.stored(p), block_size(p.cfg, p.site)[1])
        C = self.rotation(p).to(x.dtype)
        if len(C) > 1:
            return rotate_blocks(x, C)
        return (x.unflatten(-1, (-1, C.shape[-1])) @ C[0]).flatten(-2)

    def usual(self, p: View, x: Tensor) -> bool:
        """Whether one node can do it all: the default series, a block of its own for each run of features."""
        cfg, w = p.cfg, self.stored(p)
        series = cfg.use_cayley_neumann and cfg.num_cayley_neumann_terms == 5
        plain = series and not (cfg.coft or cfg.block_share or cfg.module_dropout)
        known = x.dtype == w.dtype and x.dtype in (torch.float32, torch.float64)
        return plain and known and w.dim() == 2 and plain_autograd(x)

    def post(self, p: View, y: Tensor) -> Tensor:
        return self.pre(p, y)

    def fold(self, p: View, W: Tensor) -> Tensor:
        C = self.rotation(p).to(W.dtype)
        blocks, size = block_size(p.cfg, p.site)
        C = C.expand(blocks, size, size).unflatten(0, (p.site.groups, -1))
        parts = W.flatten(1).unflatten(0, (p.site.groups, -1)).unflatten(-1, (-1, size))
        return torch.einsum("gonk,gnck->gonc", parts, C).reshape(W.shape)
