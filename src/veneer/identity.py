"""Whether an adapter leaves one layer's output as the base has it, by a call on a few made-up rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base_calls import Base
from .kinds import Replace
from .layer import Adapted


def _rows(layer: Adapted) -> Tensor | None:
    """A small input for the layer; None for kinds whose input is not known here."""
    site = layer.site
    if site.stored.is_meta:
        return None
    if site.kind == "embedding":
        return torch.arange(min(4, site.inp), device=site.device)[None]
    if site.kind not in ("linear", "conv"):
        return None
    space: tuple[int, ...] = ()
    if site.kernel:
        dilation: Any = site.module.dilation
        space = tuple(d * (k - 1) + 2 for k, d in zip(site.kernel, dilation, strict=True))
    generator = torch.Generator().manual_seed(0)  # the user's random numbers stay as they are
    dtype = site.dtype if site.dtype.is_floating_point and site.dtype.itemsize > 1 else torch.float32
    return torch.randn(2, site.inp, *space, generator=generator).to(device=site.device, dtype=dtype)


def _pair(layer: Adapted, adapter: str) -> tuple[Tensor, Tensor] | None:
    """(base's output, adapter's output) without dropout; None where the layer cannot be asked."""
    method = layer.entries[adapter].method
    x = _rows(layer)
    if x is None or not method.mergeable or isinstance(method, Replace):
        return None
    if any(getattr(h, leaf).is_meta for h, leaf in layer.entries[adapter].where.values()):
        return None
    training = layer.training
    layer.training = False
    try:
        with torch.no_grad():
            base = Base(layer.site)
            y = base(x)
            view = layer.view(adapter, layer.compute_dtype(x))
            return y, method.forward((view,), x, base, (), {})
    finally:
        layer.training = training


def is_identity(layer: Adapted, adapter: str) -> bool:
    """True where the adapter is known to change nothing on this layer."""
    pair = _pair(layer, adapter)
    return pair is not None and _close(*pair)


def broken_identity(layer: Adapted, adapter: str) -> bool:
    """True where the adapter is known to change the layer's output."""
    pair = _pair(layer, adapter)
    return pair is not None and not _close(*pair)


def _close(y: Tensor, z: Tensor) -> bool:
    tolerance = max(1e-4, 4 * torch.finfo(y.dtype).eps)
    y, z = y.float(), z.float()
    return bool((y - z).abs().max() <= tolerance * y.abs().max().clamp(min=1e-6))
