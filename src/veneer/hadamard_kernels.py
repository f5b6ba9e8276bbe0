"""Weights made of elementwise products with low-rank matrices, each as one autograd node that keeps the factors and no
matrix of the weight's size: backward makes again what it needs of those.

modulated(W, M, B, A, D, C, s)    W + s (M * (B A) + D C)           HiRA; with D and C, GLoRA
hadamard(W, a1, b1, a2, b2, s)    W + s (a1 b1) * (a2 b2)           LoHa

Plain references beside them, which run where a node does not apply; tests/engine/test_method_kernels.py holds the two
equal. A gradient that must itself be differentiable is that of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .kernels import plain_autograd
from .scaled_kernels import by_reference

__all__ = ["hadamard", "hadamard_reference", "modulated", "modulated_reference"]


def _fits(W: Tensor, scaling: float, *others: Tensor | None) -> bool:
    return (
        plain_autograd(W)
        and not isinstance(scaling, Tensor)
        and all(t is None or (t.dtype == W.dtype and not t.is_meta) for t in others)
    )


# -- W + s (M * (B A) + D C) ------------------------------------------------------------------------------------
def modulated_reference(
    W: Tensor, M: Tensor, B: Tensor, A: Tensor, D: Tensor | None, C: Tensor | None, scaling: float
) -> Tensor:
    """W, M (out, n), B and D (out, r), A and C (r, n); D and C may be None."""
    change = M * (B @ A)
    if D is not None and C is not None:
        change = change + D @ C
    return W + change * scaling


def modulated(W: Tensor, M: Tensor, B: Tensor, A: Tensor, D: Tensor | None, C: Tensor | None, scaling: float) -> Tensor:
    """modulated_reference; one autograd node where M is frozen and all have one dtype."""
    if M.requires_grad or not _fits(W, scaling, M, B, A, D, C):
        return modulated_reference(W, M, B, A, D, C, scaling)
    return _Modulated.apply(W, M, B, A, D, C, scaling)  # type: ignore[no-any-return]


class _Modulated(Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, M: Tensor, B: Tensor, A: Tensor, D: Tensor | None, C: Tensor | None,
                scaling: float) -> Tensor:  # fmt: skip
        P = B @ A
        torch.addcmul(W, M, P, value=scaling, out=P)
        ctx.save_for_backward(W, M, B, A, D, C)
        ctx.scaling = scaling
        return P if D is None or C is None else P.addmm_(D, C, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, M, B, A, D, C = ctx.saved_tensors
        needs, s = ctx.needs_input_grad, ctx.scaling
        if torch.is_grad_enabled():
            return by_reference(modulated_reference, (W, M, B, A, D, C, s), needs, g)
        gB = gA = gD = gC = None
        if needs[2] or needs[3]:
            gP = g * M
            gB, gA = (gP @ A.mT).mul_(s), (B.mT @ gP).mul_(s)
        if D is not None and C is not None:
            gD, gC = (g @ C.mT).mul_(s), (D.mT @ g).mul_(s)
        return g if needs[0] else None, None, gB, gA, gD, gC, None


# -- W + s (a1 b1) * (a2 b2) ------------------------------------------------------------------------------------
def hadamard_reference(W: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scaling: float) -> Tensor:
    """W (out, n), a1 and a2 (out, r), b1 and b2 (r, n)."""
    return W + (a1 @ b1) * (a2 @ b2) * scaling


def hadamard(W: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scaling: float) -> Tensor:
    """hadamard_reference; one autograd node where all have one dtype."""
    if not _fits(W, scaling, a1, b1, a2, b2):
        return hadamard_reference(W, a1, b1, a2, b2, scaling)
    return _Hadamard.apply(W, a1, b1, a2, b2, scaling)  # type: ignore[no-any-return]


class _Hadamard(Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scaling: float) -> Tensor:
        first, second = a1 @ b1, a2 @ b2
        ctx.save_for_backward(W, a1, b1, a2, b2)
        ctx.scaling = scaling
        return torch.addcmul(W, first, second, value=scaling, out=first)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, a1, b1, a2, b2 = ctx.saved_tensors
        needs, s = ctx.needs_input_grad, ctx.scaling
        if torch.is_grad_enabled():
            return by_reference(hadamard_reference, (W, a1, b1, a2, b2, s), needs, g)
        found: list[Tensor] = []
        for a, b, other_a, other_b in ((a1, b1, a2, b2), (a2, b2, a1, b1)):
            gP = (other_a @ other_b).mul_(g)
            found += [(gP @ b.mT).mul_(s), (a.mT @ gP).mul_(s)]
        return g if needs[0] else None, *found, None
