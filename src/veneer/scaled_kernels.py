"""Low-rank changes with trained vectors in them, each with the base's product in one autograd node: VeRA's, whose
matrices are frozen, and DoRA's, which scales the sum. Plain references beside them; tests/engine/test_kernels.py
holds the two equal, gradients included.

The vectors act on activations, so no gradient of a matrix's size is computed for them. A gradient that must itself be
differentiable is that of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "by_reference",
    "rescaled_low_rank",
    "rescaled_low_rank_reference",
    "vector_low_rank",
    "vector_low_rank_reference",
]


def by_reference(
    reference: Callable[..., Tensor], args: Sequence[Any], needs: Sequence[bool], g: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of reference(*args), weighted by g, with a graph of their own; None where `needs` says no."""
    wanted = [i for i, need in enumerate(needs) if need]
    with torch.enable_grad():
        y = reference(*args)
    found = torch.autograd.grad(y, [args[i] for i in wanted], g, create_graph=True, allow_unused=True)
    out: list[Tensor | None] = [None] * len(needs)
    for i, gradient in zip(wanted, found, strict=True):
        out[i] = gradient
    return tuple(out)


# -- y = x W^T + b + scaling e * ((d * (drop(x) A^T)) B^T) ----------------------------------------------------
def vector_low_rank_reference(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, d: Tensor, e: Tensor, scaling: float,
    keep: Tensor | None, rate: float,
) -> Tensor:  # fmt: skip
    """x (..., inp), W (out, inp), A (r, inp), B (out, r), d (r,), e (out,), keep like x or None."""
    dropped = x if keep is None else x * keep / (1 - rate)
    return F.linear(x, W, b) + F.linear(F.linear(dropped, A) * d, B) * (e * scaling)


def vector_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, d: Tensor, e: Tensor, scaling: float,
    keep: Tensor | None, rate: float,
) -> Tensor:  # fmt: skip
    """vector_low_rank_reference as one autograd node; A and B get no gradient. All tensors have one dtype."""
    args = (x, W, b, A, B, d, e, scaling, keep, rate)
    if A.requires_grad or B.requires_grad:
        return vector_low_rank_reference(*args)
    return _VectorLowRank.apply(*args)  # type: ignore[no-any-return]


class _VectorLowRank(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, d: Tensor, e: Tensor,
                scaling: float, keep: Tensor | None, rate: float) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], len(W))  # returned as it is, not as a view: callers may write into it
        y = out.view(-1, len(W))
        if b is None:
            torch.mm(flat, W.mT, out=y)
        else:
            torch.addmm(b, flat, W.mT, out=y)
        h = flat @ A.mT if keep is None else ((flat * keep.reshape(flat.shape)) @ A.mT).div_(1 - rate)
        u = (h * d) @ B.mT
        y.add_(u * (e * scaling))  # rounds as the reference does: both ways give the same bits
        ctx.scaling, ctx.rate = scaling, rate
        ctx.save_for_backward(x, W, b, A, B, d, e, h, u, keep)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, b, A, B, d, e, h, u, keep = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            args = (x, W, b, A, B, d, e, ctx.scaling, keep, ctx.rate)
            return by_reference(vector_low_rank_reference, args, needs, g)
        gy = g.reshape(-1, g.shape[-1])
        gx = gW = gb = gd = ge = None
        if needs[0] or needs[5]:
            gh = gy @ (B * (e * ctx.scaling)[:, None])
            gd = (gh * h).sum(0)
        if needs[0]:
            gx, low = gy @ W, gh.mul_(d)
            if keep is None:
                gx.addmm_(low, A)
            else:
                gx.add_((low.div_(1 - ctx.rate) @ A).mul_(keep.reshape(gx.shape)))
            gx = gx.view(x.shape)
        if needs[1]:
            gW = gy.mT @ x.reshape(-1, x.shape[-1])
        if needs[2]:
            gb = gy.sum(0)
        if needs[6]:
            ge = u.mul(gy).sum(0).mul_(ctx.scaling)
        return gx, gW, gb, None, None, gd if needs[5] else None, ge, None, None, None


# -- y = c * (x W^T + scaling (x A^T) B^T) + b ----------------------------------------------------------------
def rescaled_low_rank_reference(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: Tensor, scaling: float
) -> Tensor:
    """x (..., inp), W (out, inp), A (r, inp), B (out, r), c (out,)."""
    y = (F.linear(x, W) + F.linear(F.linear(x, A), B) * scaling) * c
    return y if b is None else y + b


def rescaled_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: Tensor, scaling: float
) -> Tensor:
    """rescaled_low_rank_reference as one autograd node. All tensors have one dtype."""
    return _RescaledLowRank.apply(x, W, b, A, B, c, scaling)  # type: ignore[no-any-return]


class _RescaledLowRank(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: Tensor,
                scaling: float) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ A.mT
        # b in and out again: the rounding of the layer's own call, so that both ways give the same bits
        plain = flat @ W.mT if b is None else torch.addmm(b, flat, W.mT).sub_(b)
        plain.addmm_(h, B.mT, alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, W, b, A, B, c, h, plain)
        out = x.new_empty(*x.shape[:-1], len(W))
        torch.mul(plain, c, out=out.view(plain.shape))
        return out if b is None else out.add_(b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, b, A, B, c, h, plain = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return by_reference(rescaled_low_rank_reference, (x, W, b, A, B, c, ctx.scaling), needs, g)
        flat, gy = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        gx = gW = gb = gA = gB = gc = None
        gp = gy * c
        gh = (gp @ B).mul_(ctx.scaling)
        if needs[0]:
            gx = (gp @ W).addmm_(gh, A).view(x.shape)
        if needs[1]:
            gW = gp.mT @ flat
        if needs[2]:
            gb = gy.sum(0)
        if needs[3]:
            gA = gh.mT @ flat
        if needs[4]:
            gB = (h.mT @ gp).mul_(ctx.scaling).mT  # (r, tokens) first: the faster shape of the product
        if needs[5]:
            gc = torch.mul(gy, plain, out=gp).sum(0)
        return gx, gW, gb, gA, gB, gc, None
