"""OFT's rotation of activations in one autograd node: the blocks' skew matrices, their series, and the product.

    x'_k = x_k C_k,   C = (I + Q)(I + Q + Q^2 + Q^3) = I + 2 Q + 2 Q^2 + (2 Q + Q^2) Q^2

Two products of small matrices make C, four its gradient; Q^T = -Q and (Q^2)^T = Q^2 spare the transposes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .scaled_kernels import by_reference

__all__ = ["rotated", "rotated_reference"]


@lru_cache(maxsize=64)
def _upper(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat places of the upper triangle, row by row, and of their mirror images."""
    i, j = torch.triu_indices(size, size, 1, device=device)
    return i * size + j, j * size + i


def rotated_reference(x: Tensor, w: Tensor, size: int) -> Tensor:
    """x (..., blocks * size), w (blocks, size (size - 1) / 2)."""
    over, under = _upper(size, w.device)
    flat = w.new_zeros(len(w), size * size).index_copy(1, over, w).index_copy(1, under, -w)
    Q = flat.unflatten(1, (size, size))
    more = torch.eye(size, dtype=w.dtype, device=w.device) + Q
    C = more + more @ (Q + Q @ Q + Q @ Q @ Q)
    return torch.einsum("...kb,kbc->...kc", x.unflatten(-1, (len(w), size)), C).flatten(-2)


def rotated(x: Tensor, w: Tensor, size: int) -> Tensor:
    """rotated_reference as one autograd node. x and w have one dtype."""
    return _Rotated.apply(x, w, size)  # type: ignore[no-any-return]


def _parts(x: Tensor, size: int) -> Tensor:
    """(..., blocks * size) -> (blocks, tokens, size), a stride and no copy where x is contiguous."""
    return x.reshape(-1, x.shape[-1] // size, size).transpose(0, 1)


def _times(x: Tensor, C: Tensor) -> Tensor:
    """Each block of x times its matrix, written where it belongs."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.bmm(_parts(x, C.shape[-1]), C, out=_parts(out, C.shape[-1]))
    return out


class _Rotated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, size: int) -> Tensor:
        over, under = _upper(size, w.device)
        Q = w.new_zeros(len(w), size * size)
        Q[:, over] = w
        Q[:, under] = -w
        Q = Q.view(-1, size, size)
        squared = torch.bmm(Q, Q)
        most = torch.add(squared, Q, alpha=2)
        C = torch.baddbmm(most, most, squared).add_(squared)
        C.diagonal(dim1=1, dim2=2).add_(1)
        ctx.save_for_backward(x, w, Q, squared, C)
        return _times(x, C)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, Q, squared, C = ctx.saved_tensors
        size = C.shape[-1]
        if torch.is_grad_enabled():
            return by_reference(rotated_reference, (x, w, size), ctx.needs_input_grad, g)
        gx = _times(g, C.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gx, None, None
        gC = torch.bmm(_parts(x, size).mT, _parts(g, size))
        g_most = torch.baddbmm(gC, gC, squared)  # of 2 Q + Q^2
        g_squared = gC + g_most
        g_squared -= torch.bmm(Q, gC).mul_(2)  # (2 Q + Q^2)^T gC
        g_squared.baddbmm_(squared, gC)
        gQ = g_most.mul_(2).baddbmm_(g_squared, Q, alpha=-1).baddbmm_(Q, g_squared, alpha=-1).flatten(1)
        over, under = _upper(size, Q.device)
        return gx, gQ[:, over] - gQ[:, under], None
