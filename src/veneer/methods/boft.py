"""BOFT: orthogonal fine-tuning by butterfly factors. Liu et al. 2023, arXiv:2311.06243, sections 3 and 4.

    y = s * (W F_1 F_2 ... F_m x) + b

    F_i = P_i blockdiag(C_1, C_2, ...) P_i^T,   C = (I + K)(I - K)^-1,   K = (A - A^T) / 2

    boft_R (m, blocks, b, b)    the A of every block; starts at zero, so that every C is the identity
    boft_s (out, 1)             starts at one; (1, out) on a convolution

P_1 is the identity; P_i gathers the half blocks of 2^(i-1) neighbouring blocks, the even ones first, so that m
factors mix b 2^(m-1) features. On a convolution the rotation acts on the unfolded patch, that is, on W.flatten(1).
The last active adapter acts first on x. Merges. Blocks rotate the activations as one batched product; neither
permutations nor the rotation are ever matrices. Departures from peft: several factors need no compiled extension
(peft falls back to one factor without it); groups, Conv1d, Conv3d and transformers' Conv1D work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..errors import AdapterError
from ..kinds import Gate, Spec
from ..site import Site
from ..view import View


@dataclass
class BOFTConfig(AdapterConfig):
    """boft_block_size: features a block rotates; boft_block_num: number of blocks. Give one of them, the other 0.

    boft_n_butterfly_factor: number of factors m. boft_dropout: share of blocks left out in a training step. bias:
    "none", "all" or "boft_only". init_weights: False draws at random, for tests.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BOFT"
        size, num = self.boft_block_size, self.boft_block_num
        if bool(size) == bool(num):
            raise ValueError(f"give boft_block_size ({size}) or boft_block_num ({num}), and 0 for the other one")
        if size < 0 or num < 0:
            raise ValueError(f"boft_block_size ({size}) and boft_block_num ({num}) must not be negative")
        if self.boft_n_butterfly_factor < 1:
            raise ValueError(f"boft_n_butterfly_factor must be at least 1, got {self.boft_n_butterfly_factor}")


def features(site: Site) -> int:
    """How many inputs one output reads: the columns of W.flatten(1)."""
    return site.inp // site.groups * math.prod(site.kernel)


def rotate_blocks(x: Tensor, C: Tensor) -> Tensor:
    """Each run of b features of x (..., blocks * b) times its own matrix of C (blocks, b, b)."""
    blocks, b, _ = C.shape
    parts = x.reshape(-1, blocks, b).transpose(0, 1)  # a stride, not a copy: the product reads it as it lies
    return torch.bmm(parts, C).transpose(0, 1).reshape(x.shape)


def butterfly(x: Tensor, i: int, b: int, back: bool = False) -> Tensor:
    """P_(i+1) applied to the last axis; back: its transpose."""
    if i == 0:
        return x
    shape = (-1, 2, 2**i, b // 2) if back else (-1, 2**i, 2, b // 2)
    return x.unflatten(-1, shape).transpose(-3, -2).reshape(x.shape)


class BOFT(Gate):
    Config = BOFTConfig
    sites = frozenset({"linear", "conv"})
    prefix = "boft_"
    last_first = True
    post_sees_bias = False
    patches = True

    def check(self, cfg: Any, site: Site) -> None:
        n, asked = features(site), cfg.boft_block_size or cfg.boft_block_num
        name = "boft_block_size" if cfg.boft_block_size else "boft_block_num"
        if n % asked:
            raise AdapterError(f"{site!r}: {name} ({asked}) must divide the {n} inputs of each output")
        b, factors = cfg.boft_block_size or n // asked, cfg.boft_n_butterfly_factor
        if factors > 1 and (b % 2 or n % (b * 2 ** (factors - 1))):
            raise AdapterError(
                f"{site!r}: boft_n_butterfly_factor ({factors}) needs blocks of an even size, {b} here, and their "
                f"number, {n // b}, divisible by {2 ** (factors - 1)}; use fewer factors or another {name}"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        n = features(site)
        b = cfg.boft_block_size or n // cfg.boft_block_num
        scale = (1, site.out) if site.kernel else (site.out, 1)
        return {"boft_R": Spec((cfg.boft_n_butterfly_factor, n // b, b, b), raw=True), "boft_s": Spec(scale)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        A, s = p.boft_R, p.boft_s
        p.fill("boft_R", torch.zeros_like(A) if cfg.init_weights else 0.1 * torch.randn_like(A))
        p.fill("boft_s", torch.ones_like(s) if cfg.init_weights else 1 + 0.1 * torch.randn_like(s))
        return None

    def rotations(self, p: View) -> Tensor:
        """C of every block, (m, blocks, b, b), in float32 at least: a solve has no half precision."""
        A = p.boft_R.to(torch.promote_types(p.boft_R.dtype, torch.float32))
        K = 0.5 * (A - A.mT)
        eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device).expand_as(K)
        C = torch.linalg.solve(eye - K, eye + K, left=False)
        if p.cfg.boft_dropout and p.training and torch.is_grad_enabled():  # merging runs without gradients
            keep = torch.rand(*C.shape[:2], 1, 1, device=C.device) >= p.cfg.boft_dropout
            C = torch.where(keep, C, eye)
        return C

    def pre(self, p: View, x: Tensor) -> Tensor:
        """F_1 F_2 ... F_m applied to the vectors along the last axis."""
        C = self.rotations(p).mT.to(x.dtype)
        for i in reversed(range(len(C))):
            x = self.factor(x, C, i)
        return x

    def factor(self, x: Tensor, C: Tensor, i: int) -> Tensor:
        b = C.shape[-1]
        return butterfly(rotate_blocks(butterfly(x, i, b, back=True), C[i]), i, b)

    def post(self, p: View, y: Tensor) -> Tensor:
        return y * p.boft_s.flatten()

    def fold(self, p: View, W: Tensor) -> Tensor:
        C, rows = self.rotations(p).to(W.dtype), W.flatten(1)
        for i in range(len(C)):
            rows = self.factor(rows, C, i)
        return rows.reshape(W.shape)
