"""Where a base layer's weight is not a plain tensor. Each backend file says which modules it matches and gives a
Site for them; methods need not know."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..site import Site

Maker = Callable[[nn.Module, str], "Site | None"]
MAKERS: list[Maker] = []


def register(maker: Maker) -> Maker:
    """Add a backend: a function (module, name) -> Site, or None where the module is not its own."""
    MAKERS.append(maker)
    return maker


def site_of_backend(module: nn.Module, name: str) -> Site | None:
    for make in MAKERS:
        site = make(module, name)
        if site is not None:
            return site
    return None
