"""FRoD's products. Its matrix diag(l) + S is nearly diagonal, S with one entry in a hundred, so it multiplies as a
sparse matrix, and the gradient of S is computed at its places alone.

factored(x, ...)   y = x (U (diag(l) + S) V^T)^T + b      x passed through the factors: for few vectors
composed(U, ...)   U (diag(l) + S) V^T                    the matrix itself: for many

Each is one autograd node with a plain reference; tests/engine/test_kernels.py holds the two equal. U and V are
frozen and get no gradient. A gradient that must itself be differentiable is that of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .scaled_kernels import by_reference
from .sparse_kernels import Pattern

__all__ = ["composed", "composed_reference", "factored", "factored_reference"]


def factored_reference(
    x: Tensor, U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, b: Tensor | None, pattern: Pattern
) -> Tensor:
    """x (..., n), U (out, n), V (n, n), diagonal (n,), values (k,), b (out,) or None."""
    return F.linear(x @ V @ (torch.diag(diagonal) + pattern.dense(values)).mT, U, b)


def factored(
    x: Tensor, U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, b: Tensor | None, pattern: Pattern
) -> Tensor:
    return _Factored.apply(x, U, V, diagonal, values, b, pattern)  # type: ignore[no-any-return]


class _Factored(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, b: Tensor | None,
                pattern: Pattern) -> Tensor:  # fmt: skip
        seen = V.mT @ x.reshape(-1, x.shape[-1]).mT  # (n, tokens): a sparse product reads whole rows
        h = (seen * diagonal[:, None]).add_(pattern.matrix(values) @ seen)
        y = x.new_empty(*x.shape[:-1], len(U))
        rows = y.view(-1, len(U))
        if b is None:
            torch.mm(h.mT, U.mT, out=rows)
        else:
            torch.addmm(b, h.mT, U.mT, out=rows)
        ctx.pattern = pattern
        ctx.save_for_backward(x, U, V, diagonal, values, b, seen)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, U, V, diagonal, values, b, seen = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return by_reference(factored_reference, (x, U, V, diagonal, values, b, ctx.pattern), needs, g)
        gy = g.reshape(-1, g.shape[-1])
        gh = U.mT @ gy.mT
        gx = gd = gv = gb = None
        if needs[3]:
            gd = (gh * seen).sum(1)
        if needs[4]:
            gv = ctx.pattern.sample(gh, seen)
        if needs[5]:
            gb = gy.sum(0)
        if needs[0]:
            back = ctx.pattern.transposed(values) @ gh
            gx = (back.addcmul_(gh, diagonal[:, None]).mT @ V.mT).view(x.shape)
        return gx, None, None, gd, gv, gb, None


def composed_reference(U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """(out, n)"""
    return U @ (torch.diag(diagonal) + pattern.dense(values)) @ V.mT


def composed(U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    return _Composed.apply(U, V, diagonal, values, pattern)  # type: ignore[no-any-return]


class _Composed(Function):
    @staticmethod
    def forward(ctx: Any, U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        across = U.mT.contiguous()
        h = (across * diagonal[:, None]).add_(pattern.transposed(values) @ across)
        ctx.pattern = pattern
        ctx.save_for_backward(U, V, diagonal, values)
        return h.mT @ V.mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        U, V, diagonal, values = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_reference(composed_reference, (U, V, diagonal, values, ctx.pattern), ctx.needs_input_grad, g)
        seen, across = V.mT @ g.mT, U.mT.contiguous()  # both (n, out)
        return None, None, (across * seen).sum(1), ctx.pattern.sample(across, seen), None
