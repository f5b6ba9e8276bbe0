"""OSF's layer by its singular factors, in one autograd node with the projection of its gradients.

    y = x ([V_h; V_l]^T diag(S_h, S_l) [U_h U_l]^T) + b

The gradients of U_l and V_l lose their parts along U_h and V_h, which are orthonormal. The products with U_h and V_h
that the projection needs are those of the layer itself. U_h, S_h and V_h are frozen and get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .scaled_kernels import by_reference

__all__ = ["Outside", "singular", "singular_reference"]


class Outside(Function):
    """x unchanged; its gradient (n, k) without the part in the span of Q's orthonormal columns (n, h)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, Q: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (Q,) = ctx.saved_tensors
        return grad - Q @ (Q.mT @ grad), None


def singular_reference(
    x: Tensor, Uh: Tensor, Sh: Tensor, Vh: Tensor, Ul: Tensor, Sl: Tensor, Vl: Tensor, b: Tensor | None
) -> Tensor:
    """x (..., inp), Uh (out, h), Sh (h,), Vh (h, inp), Ul (out, k), Sl (k,), Vl (k, inp), b (out,) or None."""
    Ul, Vl = Outside.apply(Ul, Uh), Outside.apply(Vl.mT, Vh.mT).mT
    return F.linear(F.linear(x, Vh) * Sh, Uh) + F.linear(F.linear(x, Vl) * Sl, Ul, b)


def singular(
    x: Tensor, Uh: Tensor, Sh: Tensor, Vh: Tensor, Ul: Tensor, Sl: Tensor, Vl: Tensor, b: Tensor | None
) -> Tensor:
    """singular_reference as one autograd node. All tensors have one dtype."""
    return _Singular.apply(x, Uh, Sh, Vh, Ul, Sl, Vl, b)  # type: ignore[no-any-return]


class _Singular(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, Uh: Tensor, Sh: Tensor, Vh: Tensor, Ul: Tensor, Sl: Tensor, Vl: Tensor,
                b: Tensor | None) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        high, low = flat @ Vh.mT, flat @ Vl.mT
        y = x.new_empty(*x.shape[:-1], len(Uh))
        rows = y.view(-1, len(Uh))
        if b is None:
            torch.mm(high * Sh, Uh.mT, out=rows)
        else:
            torch.addmm(b, high * Sh, Uh.mT, out=rows)
        rows.addmm_(low * Sl, Ul.mT)
        ctx.save_for_backward(x, Uh, Sh, Vh, Ul, Sl, Vl, b, high, low)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, Uh, Sh, Vh, Ul, Sl, Vl, b, high, low = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return by_reference(singular_reference, (x, Uh, Sh, Vh, Ul, Sl, Vl, b), needs, g)
        flat, gy = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        gx = gU = gS = gV = gb = None
        gl = gy @ Ul
        if needs[5]:
            gS = (gl * low).sum(0)
        gl.mul_(Sl)
        gh = gy @ Uh
        if needs[4]:
            scaled = low * Sl
            gU = (gy.mT @ scaled).addmm_(Uh, gh.mT @ scaled, alpha=-1)
        if needs[6]:
            gV = (gl.mT @ flat).addmm_(gl.mT @ high, Vh, alpha=-1)
        if needs[0]:
            gx = (gh.mul_(Sh) @ Vh).addmm_(gl, Vl).view(x.shape)
        if needs[7]:
            gb = gy.sum(0)
        return gx, None, None, None, gU, gS, gV, gb
