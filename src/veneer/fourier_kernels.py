"""FourierFT's change applied to activations without the change itself: transforms of rows, a sparse product between.

    y = Re(fft2(F)) x = Re(fft_out(F fft_inp(x))),   F (out, inp) sparse and real

Both transforms are of real vectors, so half of each spectrum says all. F becomes a sparse matrix between the halves'
real and imaginary parts in turn, (2 (out / 2 + 1), 2 (inp / 2 + 1)), with two entries for each of its own: cosines
meet cosines and sines sines. What a token costs does not grow with out * inp. The base's product may be had in the same
node, which saves a full-size tensor each way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .scaled_kernels import by_reference
from .sparse_kernels import Pattern, version_of

__all__ = ["Halves", "halves_of", "spectral", "spectral_reference"]


class Halves(NamedTuple):
    """The sparse matrix's places, for each entry of F twice (real, imaginary) its place's number, and what it counts
    in the gradient of F's entry, forward and backward: half where the mirrored half repeats it, and a sign."""

    pattern: Pattern
    entry: Tensor  # (2 n,)
    sign: Tensor
    forward: Tensor
    backward: Tensor
    out: int
    inp: int

    def values(self, s: Tensor, weight: Tensor) -> Tensor:
        """The matrix's values for F's entries s (n,)."""
        return s.new_zeros(len(self.pattern.i)).index_add(0, self.entry, s.repeat(2) * weight)


def halves_of(memory: dict[str, Any], at: Tensor, out: int, inp: int, dtype: torch.dtype) -> Halves:
    """Of F's places `at` (2, n), kept in an adapter's memory until they change."""
    found = memory.get("halves")
    if found is None or found[0] is not at or found[1] != version_of(at) or found[2].sign.dtype != dtype:
        with torch.inference_mode(False):  # a first call for inference makes what training goes on with
            found = memory["halves"] = (at, version_of(at), _halves(at, out, inp, dtype))
    return found[2]  # type: ignore[no-any-return]


def _halves(at: Tensor, out: int, inp: int, dtype: torch.dtype) -> Halves:
    (u, v), rows, columns = at, out // 2 + 1, inp // 2 + 1
    row, column = torch.minimum(u, out - u), torch.minimum(v, inp - v)
    once = lambda k, n: torch.where((k == 0) | (2 * k == n), 1.0, 0.5).to(dtype).repeat(2)
    turned = torch.where((u == row) == (v == column), -1.0, 1.0).to(dtype)  # the sign of sin a sin b
    sign = torch.cat([torch.ones_like(turned), turned])
    places = torch.cat([4 * row * columns + 2 * column, (4 * row + 2) * columns + 2 * column + 1])
    flat, entry = places.unique(return_inverse=True)  # an entry of F and its mirror image share one
    forward, backward = sign * once(row, out), sign * once(column, inp)
    return Halves(Pattern(flat, 2 * rows, 2 * columns), entry, sign, forward, backward, out, inp)


def spectral_reference(
    x: Tensor, s: Tensor, halves: Halves, W: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """Re(fft2(F)) x for x (..., inp), F's entries s (n,): (..., out); with W (out, inp) added to x W^T + b."""
    parts = halves.pattern.dense(halves.values(s, halves.forward)) @ _spectrum(x.reshape(-1, halves.inp))
    change = _rows(parts, halves.out).reshape(*x.shape[:-1], halves.out)
    return change if W is None else F.linear(x, W, b) + change


def spectral(x: Tensor, s: Tensor, halves: Halves, W: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """spectral_reference as one autograd node. All tensors have one dtype."""
    return _Spectral.apply(x, s, halves, W, b)  # type: ignore[no-any-return]


def _spectrum(rows: Tensor) -> Tensor:
    """Real (tokens, n) -> real and imaginary parts of half its spectrum in turn, (2 (n / 2 + 1), tokens)."""
    return torch.view_as_real(torch.fft.rfft(rows)).flatten(1).mT.contiguous()


def _rows(parts: Tensor, n: int) -> Tensor:
    """Parts of half a spectrum -> the real rows (tokens, n) that have it, not divided by n."""
    waves = torch.view_as_complex(parts.mT.contiguous().unflatten(1, (-1, 2)))
    return torch.fft.irfft(waves, n=n, norm="forward")


class _Spectral(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, halves: Halves, W: Tensor | None, b: Tensor | None) -> Tensor:
        flat = x.reshape(-1, halves.inp)
        read = _spectrum(flat)
        ctx.save_for_backward(x, s, read, W, b)
        ctx.halves = halves
        y = x.new_empty(*x.shape[:-1], halves.out)  # returned as it is, not as a view: callers may write into it
        rows = y.view(-1, halves.out)
        parts = halves.pattern.matrix(halves.values(s, halves.forward)) @ read
        if W is None:
            rows.copy_(_rows(parts, halves.out))
        elif b is None:
            torch.mm(flat, W.mT, out=rows).add_(_rows(parts, halves.out))
        else:
            torch.addmm(b, flat, W.mT, out=rows).add_(_rows(parts, halves.out))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, read, W, b = ctx.saved_tensors
        h: Halves = ctx.halves
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return by_reference(spectral_reference, (x, s, h, W, b), needs, g)
        gy = g.reshape(-1, h.out)
        back = _spectrum(gy)
        gx = gs = gW = gb = None
        if needs[0]:
            gx = _rows(h.pattern.transposed(h.values(s, h.backward)) @ back, h.inp)
            gx = (gx if W is None else gx.addmm_(gy, W)).reshape(x.shape)
        if needs[1]:
            gs = (h.pattern.sample(back, read)[h.entry] * h.sign).view(2, -1).sum(0)
        if needs[3]:
            gW = gy.mT @ x.reshape(-1, h.inp)
        if needs[4]:
            gb = gy.sum(0)
        return gx, gs, None, gW, gb
