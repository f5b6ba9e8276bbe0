"""FRoD's products. Its matrix diag(l) + S is nearly diagonal, S with one entry in a hundred, so it multiplies as a
sparse matrix, and the gradient of S is computed at its places alone.

factored(x, ...)   y = x (U (diag(l) + S) V^T)^T + b      x passed through the factors: for few vectors
composed(U, ...)   U (diag(l) + S) V^T                    the matrix itself: for many

Each is one autograd node with a plain reference; tests/engine/test_kernels.py holds the two equal. U and V are
frozen and get no gradient. A gradient that must itself be differentiable is that of the reference.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .scaled_kernels import by_reference

__all__ = ["Pattern", "composed", "composed_reference", "factored", "factored_reference"]


class Pattern:
    """The places of S: at (2, k), rows and columns, each once; size n. Also in the orders of sparse products."""

    def __init__(self, at: Tensor, n: int):
        self.at, self.n, self.version = at, n, at._version
        self.rows = self._order(at[0], at[1])
        self.columns = self._order(at[1], at[0])

    def holds(self, at: Tensor) -> bool:
        """Whether this is still the pattern of `at`."""
        return at is self.at and at._version == self.version

    def _order(self, major: Tensor, minor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = (major * self.n + minor).argsort()
        starts = torch.bincount(major, minlength=self.n).cumsum(0)
        return order, torch.cat([starts.new_zeros(1), starts]).int(), minor[order].int()

    def matrix(self, values: Tensor) -> Tensor:
        """S, sparse."""
        return self._sparse(self.rows, values)

    def transposed(self, values: Tensor) -> Tensor:
        """S^T, sparse."""
        return self._sparse(self.columns, values)

    def _sparse(self, which: tuple[Tensor, Tensor, Tensor], values: Tensor) -> Tensor:
        order, starts, minor = which
        with warnings.catch_warnings():  # torch announces, once a process, that its sparse layouts are in beta
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(starts, minor, values[order], (self.n, self.n), check_invariants=False)

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """Entries of left @ right^T at S's places, (k,), in their own order; left and right (n, m)."""
        order = self.rows[0]
        like = self._sparse(self.rows, left.new_zeros(len(order)))
        found = torch.sparse.sampled_addmm(like, left, right.mT, beta=0.0).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    def dense(self, diagonal: Tensor, values: Tensor) -> Tensor:
        """diag(diagonal) + S"""
        return torch.diag(diagonal).index_put((self.at[0], self.at[1]), values)


def factored_reference(
    x: Tensor, U: Tensor, V: Tensor, diagonal: Tensor, values: Tensor, b: Tensor | None, pattern: Pattern
) -> Tensor:
    """x (..., n), U (out, n), V (n, n), diagonal (n,), values (k,), b (out,) or None."""
    return F.linear(x @ V @ pattern.dense(diagonal, values).mT, U, b)


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
    return U @ pattern.dense(diagonal, values) @ V.mT


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
