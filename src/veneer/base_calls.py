"""What a method sees of the layer below its adapters: the base itself, or the base with another method's on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import plain_autograd
from .site import Site, watched

if TYPE_CHECKING:
    from .kinds import Method
    from .view import View

__all__ = ["Base", "Stacked"]


class Base:
    """The base layer as methods see it: a call, a weight, a bias. dtype: of a quantised layer's, in this call."""

    def __init__(self, site: Site, dtype: torch.dtype | None = None):
        self.site, self.dtype = site, dtype if site.quantised else None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.site.module(x, *args, **kwargs)

    def plain(self, x: Tensor) -> bool:
        """Whether the call is x W^T + b and nothing else, in eager autograd."""
        return self.site.plain() and x.dtype == self.site.dtype and plain_autograd(x)

    def weight(self) -> Tensor:
        W = self.site.weight()
        return W if self.dtype is None else W.to(self.dtype)

    def bias(self) -> Tensor | None:
        b = self.site.bias()
        return b if self.dtype is None or b is None else b.to(self.dtype)

    def exact_for(self, x: Tensor) -> bool:
        """Whether a product with another weight may take the call's place: a change added to the weight keeps its small
        values (float32 or better throughout, no autocast), and nobody sees the base's calls."""
        dtype, device = self.site.dtype, x.device
        fine = x.dtype == dtype and dtype in (torch.float32, torch.float64) and self.site.device == device
        free = not self.site.quantised and not watched(self.site.module)
        return fine and free and not torch.is_autocast_enabled(device.type)


class Stacked:
    """A base with one method's adapters on it, as the base of the next method's."""

    def __init__(self, base: Any, method: Method, views: tuple[View, ...]):
        self.base, self.method, self.views = base, method, views

    def plain(self, x: Tensor) -> bool:
        return False

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.method.forward(self.views, x, self.base, args, kwargs)

    def weight(self) -> Tensor:
        return self.method.merged(self.views, self.base.weight(), self.base.bias())[0]

    def bias(self) -> Tensor | None:
        return self.method.merged(self.views, self.base.weight(), self.base.bias())[1]

    def exact_for(self, x: Tensor) -> bool:
        return False
