"""A linear layer and a change at some of its rows, as aLoRA makes it: two autograd nodes around the change.

    y, picked = linear_and_rows(x, W, b, at)      # y = x W^T + b, picked = x[at]
    y = add_rows(y, f(picked), at)                # in place

Autograd's own nodes for these fill a tensor of x's size with zeros for `picked`, copy y's gradient, and add the two
gradients of x up in a third; here the picked rows' gradient goes into that of the whole. x is not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["add_rows", "linear_and_rows"]


class _LinearAndRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, at: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(W, at)
        ctx.shape = x.shape
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], W.shape[0])  # returned as it is, not as a view: add_rows writes into it
        rows = y.view(-1, W.shape[0])
        if b is None:
            torch.mm(flat, W.mT, out=rows)
        else:
            torch.addmm(b, flat, W.mT, out=rows)
        return y, flat.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, g: Tensor, of_picked: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, at = ctx.saved_tensors
        need_x, _, need_b = ctx.needs_input_grad[:3]
        gy = g.reshape(-1, g.shape[-1])
        gx = None
        if need_x:
            gx = gy @ W
            followed = torch.is_grad_enabled()  # a graph of the gradient is wanted
            gx = gx.index_add(0, at, of_picked) if followed else gx.index_add_(0, at, of_picked)
            gx = gx.view(ctx.shape)
        return gx, None, gy.sum(0) if need_b else None, None


class _AddRows(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).index_add_(0, at, change)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (at,) = ctx.saved_tensors
        return g, g.reshape(-1, g.shape[-1]).index_select(0, at) if ctx.needs_input_grad[1] else None, None


def linear_and_rows(x: Tensor, W: Tensor, b: Tensor | None, at: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T + b for a frozen W, and the rows `at` (n,) of x (..., inp) counted in one line, (n, inp)."""
    return _LinearAndRows.apply(x, W, b, at)  # type: ignore[no-any-return]


def add_rows(y: Tensor, change: Tensor, at: Tensor) -> Tensor:
    """y (..., out), contiguous, which takes change (n, out) at the rows `at`, in place."""
    return _AddRows.apply(y, change, at)  # type: ignore[no-any-return]
