"""The active adapters as compiled code reads them: at a place that stays, whose content a switch replaces.

torch.compile checks before each call whatever Python values a graph was made from. An adapter's name among them would
mean a graph for each adapter. So traced code (`Adapted.plan`, `SavedModule.running`) reads `live`, which holds the
active adapters' views and modules and no name; the layer notes at the host that it was traced, and from then on the
host has it look up its active adapters again whenever they change. Models that are not compiled have none of this, and
for them switching looks at no layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .layer import Adapted, Group

__all__ = ["Box", "Live", "modules_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Live:
    """dtype of the activations -> the active adapters in order, as `Adapted.groups` gives them."""

    def __init__(self, layer: Adapted, dtype: torch.dtype | None):
        # all at once: a graph that is being made does not see what is added to a dict it has read from
        wanted = dict.fromkeys((*_DTYPES, layer.site.dtype, dtype))
        self.groups: dict[torch.dtype | None, tuple[Group, ...]] = {
            d: layer.groups(layer.active_adapters, d) for d in wanted
        }
        held = {name: modules_of(layer, name) for name in layer.active_adapters}
        for groups in self.groups.values():
            for _, views in groups:
                for view in views:
                    view.held = held[view.name]


def modules_of(layer: nn.Module, adapter: str) -> dict[str, nn.Module]:
    """Container -> the adapter's own module in it (its dropout, its copy of the layer)."""
    boxes = {name: box for name, box in layer._modules.items() if isinstance(box, nn.ModuleDict)}
    return {name: box[adapter] for name, box in boxes.items() if adapter in box}


class Box(nn.ModuleDict):
    """A container whose layer is told when a module in it is replaced."""

    def __init__(self, layer: Adapted):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, module)
        layer: Any = self.__dict__.get("layer")
        if layer is not None and layer.__dict__.get("live") is not None:
            layer.changed()
