"""Fast paths of the adapters' hot products. Each has a plain reference, which runs wherever the fast one does not
apply; tests/engine/test_kernels.py holds the two equal, gradients included.

low_rank_linear does a Linear and its low-rank change in one autograd node. It differs from autograd's own work on

    y = x W^T + b + scaling * (drop(x) A^T) B^T

in what it does not do: no copy of y to add the change, no second tensor for the input's gradient, no float mask
for dropout, and nothing saved but x (or how it is made again, see remade.py), h = drop(x) A^T (tokens, r) and one byte
a masked number.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .int8 import Int8Weight
from .remade import keep_sources

__all__ = ["low_rank_linear", "low_rank_onto", "low_rank_reference", "mask_like", "plain_autograd"]


def plain_autograd(x: Tensor) -> bool:
    """Whether eager reverse-mode autograd runs alone: no tracing, no torch.func, no forward mode, no autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    )


def mask_like(x: Tensor, rate: float) -> Tensor:
    """A boolean tensor of x's shape, each element True with probability 1 - rate."""
    if x.device.type != "cpu" or rate >= 1 or torch.compiler.is_compiling():  # Dynamo knows no random_
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate)
    # 64 drawn bits serve four elements, a quarter of bernoulli_'s work; the part of the rate below 2^-16 is drawn, too
    count = x.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    limit = (rate * (1 << 16) + torch.rand(())).to(torch.int32).sub_(1 << 15).clamp_(max=(1 << 15) - 1)
    return (drawn >= limit).view(x.shape)


def low_rank_reference(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float, keep: Tensor | None, rate: float
) -> Tensor:
    """What low_rank_linear computes, in plain differentiable operations. x (..., inp), W (out, inp), A (r, inp),
    B (out, r), keep like x or None."""
    dropped = x if keep is None else x * keep / (1 - rate)
    return F.linear(x, W, b) + F.linear(F.linear(dropped, A), B) * scaling


def low_rank_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    keep: Tensor | None,
    rate: float,
    int8: Int8Weight | None = None,
) -> Tensor:
    """low_rank_reference as one autograd node. All tensors have one dtype; `keep` is boolean. `int8` stands in for a
    frozen W in both of its products."""
    if torch.is_grad_enabled():
        if A.requires_grad or W.requires_grad:
            y: Tensor = _LowRankLinear.apply(x, W, b, A, B, scaling, keep, rate, int8)  # type: ignore[assignment]
            return keep_sources(y, x) if A.is_leaf and B.is_leaf else keep_sources(y, x, W, A, B)
        if x.requires_grad or B.requires_grad or (b is not None and b.requires_grad):
            h = F.linear(x, A) if keep is None else F.linear(x * keep, A) / (1 - rate)
            return low_rank_onto(x, W, b, h, B, scaling)  # a frozen A needs no x kept (LoRA-FA)
    with torch.no_grad():
        return _forward(x, W, b, A, B, scaling, keep, rate, int8)[0]


def low_rank_onto(x: Tensor, W: Tensor, b: Tensor | None, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """F.linear(x, W, b) + scaling * F.linear(h, B) for h (..., r); one autograd node, which keeps no x, where W is
    frozen. All tensors have one dtype."""
    if W.requires_grad or not plain_autograd(x):
        return F.linear(x, W, b) + F.linear(h, B) * scaling
    return _Onto.apply(x, W, b, h, B, scaling)  # type: ignore[no-any-return]


class _Onto(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, h: Tensor, B: Tensor, scaling: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], W.shape[0])
        rows = y.view(-1, W.shape[0])
        if b is None:
            torch.mm(flat, W.mT, out=rows)
        else:
            torch.addmm(b, flat, W.mT, out=rows)
        rows.addmm_(h.reshape(len(flat), -1), B.mT, alpha=scaling)
        ctx.save_for_backward(W, h if ctx.needs_input_grad[4] else None, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, h, B = ctx.saved_tensors
        need_x, _, need_b, need_h, need_B = ctx.needs_input_grad[:5]
        gy = g.reshape(-1, g.shape[-1])
        gx = g @ W if need_x else None
        gb = gy.sum(0) if need_b else None
        gh = (g @ B) * ctx.scaling if need_h else None
        gB = (h.reshape(len(gy), -1).mT @ gy).mT * ctx.scaling if need_B else None
        return gx, None, gb, gh, gB, None


def _forward(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    keep: Tensor | None,
    rate: float,
    int8: Int8Weight | None = None,
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], W.shape[0])  # returned as it is, not as a view: callers may write into it
    rows = y.view(-1, W.shape[0])
    if int8 is not None:
        int8.product(x, rows)
        if b is not None:
            rows.add_(b)
    elif b is None:
        torch.mm(flat, W.mT, out=rows)
    else:
        torch.addmm(b, flat, W.mT, out=rows)
    h = flat @ A.mT if keep is None else ((flat * keep.reshape(flat.shape)) @ A.mT).div_(1 - rate)
    rows.addmm_(h, B.mT, alpha=scaling)
    return y, h


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        keep: Tensor | None,
        rate: float,
        int8: Int8Weight | None,
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, scaling, keep, rate, int8)
        ctx.int8, ctx.scaling, ctx.rate, ctx.has_bias = int8, scaling, rate, b is not None
        ctx.save_for_backward(x, W, A, B, h, keep)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B, h, keep = ctx.saved_tensors
        need_x, need_w, need_b, need_A, need_B = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: h and the in-place sums would hide inputs
            return _differentiable(ctx, g, x, W, A, B, keep)
        flat, gy = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        gh = (gy @ B).mul_(ctx.scaling / (1 - ctx.rate))
        gx = gW = gb = gA = gB = None
        if need_x:
            gx = gy @ W if ctx.int8 is None else ctx.int8.input_gradient(gy)
            if keep is None:
                gx.addmm_(gh, A)
            else:
                gx.add_((gh @ A).mul_(keep.reshape(flat.shape)))
            gx = gx.view(x.shape)
        if need_A:
            gA = gh.mT @ (flat if keep is None else flat * keep.reshape(flat.shape))
        if need_B:
            gB = (h.mT @ gy).mul_(ctx.scaling).mT  # (r, tokens) first: the faster shape of the product
        if need_w:
            gW = gy.mT @ flat
        if ctx.has_bias and need_b:
            gb = gy.sum(0)
        return gx, gW, gb, gA, gB, None, None, None, None


def _differentiable(
    ctx: Any, g: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, keep: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients in operations that autograd follows."""
    need_x, need_w, need_b, need_A, need_B = ctx.needs_input_grad[:5]
    dropped = x if keep is None else x * keep / (1 - ctx.rate)
    flat, gy = dropped.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    gh = (g @ B) * ctx.scaling
    gd = gh @ A
    gx = g @ W + (gd if keep is None else gd * keep / (1 - ctx.rate)) if need_x else None
    gW = gy.mT @ x.reshape(-1, x.shape[-1]) if need_w else None
    gb = gy.sum(0) if ctx.has_bias and need_b else None
    gA = gh.reshape(-1, gh.shape[-1]).mT @ flat if need_A else None
    gB = gy.mT @ (flat @ A.mT) * ctx.scaling if need_B else None
    return gx, gW, gb, gA, gB, None, None, None, None
