"""HQQ: HQQLinear, half-quadratic quantisation in groups of inputs, 1 to 8 bits. Badri and Shaji 2023.

The layer is no nn.Linear and holds its scales and zeros beside its weight, in `meta`.
"""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn

from ..site import Site
from .quantised import QuantisedSite


class HqqSite(QuantisedSite):
    library = "HQQ"
    names = ("W_q", "bias")

    @property
    def dtype(self) -> torch.dtype:
        module: Any = self.module
        return module.compute_dtype

    def bias(self) -> Tensor | None:
        module: Any = self.module
        return module.bias

    def put_bias(self, b: Any) -> None:
        module: Any = self.module
        del module.bias  # a plain tensor as the layer was made, a parameter after a merge
        module.bias = b

    def weight(self) -> Tensor:
        module: Any = self.module
        return module.dequantize().detach()

    def requantise(self, W: Tensor) -> None:
        module: Any = self.module
        bias = module.bias
        self.put_bias(None)  # quantising moves and casts it
        del module.W_q  # and does not take the place of a parameter
        try:
            module.quantize(W.to(module.compute_dtype), **module.quant_config)
            codes = module.W_q
            self.restore((nn.Parameter(codes, requires_grad=False), module.meta))
        finally:
            self.put_bias(bias)

    def packed(self) -> tuple[Any, Any]:
        module: Any = self.module
        return module.W_q, module.meta

    def restore(self, packed: Any) -> None:
        module: Any = self.module
        if "W_q" in module.__dict__:  # a plain tensor, left there by quantising
            del module.W_q
        module.W_q, module.meta = packed


def site_of(module: nn.Module, name: str) -> Site | None:
    return HqqSite(module, name) if isinstance(module, HQQLinear) and module.ready else None
