"""Where a base layer's weight is not a plain tensor: one Site class for each quantisation library, in one file.

Methods need not know: the site calls the frozen layer, hands out its weight as ordinary numbers and takes a merged
weight back by quantising it anew. A library's file is imported once the library itself is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from torch import nn

from ..site import Site

Maker = Callable[[nn.Module, str], "Site | None"]
MAKERS: list[Maker] = []
#: library -> the file here with its `site_of(module, name)`; without the library no layer can be its own
LIBRARIES = {
    "bitsandbytes": "bnb", "torchao": "ao", "hqq": "hqq_layers", "gptqmodel": "gptq", "aqlm": "aqlm_layers",
    "optimum.quanto": "quanto",
}  # fmt: skip


def register(maker: Maker) -> Maker:
    """Add a backend: a function (module, name) -> Site, or None where the module is not its own."""
    MAKERS.append(maker)
    return maker


def site_of_backend(module: nn.Module, name: str) -> Site | None:
    for make in MAKERS:
        site = make(module, name)
        if site is not None:
            return site
    for library, file in LIBRARIES.items():
        if sys.modules.get(library) is not None:
            found: Site | None = import_module(f"{__name__}.{file}").site_of(module, name)
            if found is not None:
                return found
    return None
