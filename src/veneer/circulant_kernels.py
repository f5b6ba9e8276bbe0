"""C3A's change on activations, in one autograd node with the base's product: transforms of runs of b features, one
small complex product for each frequency between.

    y = x W^T + b + irfft(sum_n X_n conj(K_mn)),   X, K the spectra of x's runs and of the kernels

The gradient of the kernels comes from the spectra, too, so no matrix of the weight's size is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .scaled_kernels import by_reference

__all__ = ["circulant_linear", "circulant_reference"]


def circulant_reference(x: Tensor, W: Tensor, b: Tensor | None, w: Tensor) -> Tensor:
    """x (..., inp), W (out, inp), b (out,) or None, kernels w (out / n, inp / n, n)."""
    n = w.shape[-1]
    X, K = torch.fft.rfft(x.unflatten(-1, (-1, n))), torch.fft.rfft(w).conj()
    return F.linear(x, W, b) + torch.fft.irfft(torch.einsum("...nf,mnf->...mf", X, K), n=n).flatten(-2)


def circulant_linear(x: Tensor, W: Tensor, b: Tensor | None, w: Tensor) -> Tensor:
    """circulant_reference as one autograd node. All tensors have one dtype, float32 or float64."""
    return _Circulant.apply(x, W, b, w)  # type: ignore[no-any-return]


def _spectra(rows: Tensor, n: int) -> Tensor:
    """(tokens, runs * n) -> (n / 2 + 1, tokens, runs)"""
    return torch.fft.rfft(rows.unflatten(-1, (-1, n))).permute(2, 0, 1).contiguous()


def _rows(spectra: Tensor, n: int) -> Tensor:
    """The way back: (tokens, runs * n)."""
    return torch.fft.irfft(spectra.permute(1, 2, 0).contiguous(), n=n).flatten(1)


class _Circulant(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, w: Tensor) -> Tensor:
        flat, n = x.reshape(-1, x.shape[-1]), w.shape[-1]
        y = x.new_empty(*x.shape[:-1], len(W))  # returned as it is, not as a view: callers may write into it
        rows = y.view(-1, len(W))
        if b is None:
            torch.mm(flat, W.mT, out=rows)
        else:
            torch.addmm(b, flat, W.mT, out=rows)
        kernels = torch.fft.rfft(w).permute(2, 1, 0).conj_physical()  # (frequencies, inp / n, out / n)
        rows.add_(_rows(torch.bmm(_spectra(flat, n), kernels), n))
        ctx.save_for_backward(x, W, b, w)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, b, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return by_reference(circulant_reference, (x, W, b, w), needs, g)
        flat, gy, n = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), w.shape[-1]
        back = _spectra(gy, n)
        gx = gW = gb = gw = None
        if needs[0]:
            gx = (gy @ W).add_(_rows(torch.bmm(back, torch.fft.rfft(w).permute(2, 0, 1)), n)).view(x.shape)
        if needs[1]:
            gW = gy.mT @ flat
        if needs[2]:
            gb = gy.sum(0)
        if needs[3]:
            found = torch.bmm(back.conj_physical_().mT, _spectra(flat, n))  # (frequencies, out / n, inp / n)
            gw = torch.fft.irfft(found.permute(1, 2, 0).contiguous(), n=n)
        return gx, gW, gb, gw
