"""quanto: QLinear with a frozen weight in 2, 4 or 8 bits, integers or floats."""

from __future__ import annotations

from typing import Any

import torch
from optimum.quanto import QLinear
from torch import Tensor, nn

from ..errors import AdapterError
from ..site import Site
from .quantised import QuantisedSite


class QuantoSite(QuantisedSite):
    library = "quanto"

    def check(self, dropout: float) -> None:
        module: Any = self.module
        if not module.frozen:
            raise AdapterError(
                f"{self!r}: its weight is still in floats, which quanto rounds at every call; call "
                "optimum.quanto.freeze(model) before the adapter is added"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def weight(self) -> Tensor:
        stored: Any = self.stored
        return stored.dequantize().detach()

    def requantise(self, W: Tensor) -> None:
        module: Any = self.module
        module.weight = nn.Parameter(W.to(self.dtype), requires_grad=False)
        module.freeze()
        module.weight.requires_grad_(False)

    def packed(self) -> Any:
        return self.stored

    def restore(self, packed: Any) -> None:
        module: Any = self.module
        module.weight = packed


def site_of(module: nn.Module, name: str) -> Site | None:
    return QuantoSite(module, name) if isinstance(module, QLinear) else None
