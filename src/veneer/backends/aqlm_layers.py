"""AQLM: a weight as sums of vectors out of learned codebooks, 2 to 4 bits a number. Egiazarian et al. 2024,
arXiv:2401.06118.
"""

from __future__ import annotations

from typing import Any

import torch
from aqlm import QuantizedLinear
from torch import nn

from ..site import Site
from .quantised import AskedSite


class AqlmSite(AskedSite):
    library = "AQLM"
    names = ("codes", "bias")

    @property
    def dtype(self) -> torch.dtype:
        module: Any = self.module
        return module.codebooks.dtype


def site_of(module: nn.Module, name: str) -> Site | None:
    return AqlmSite(module, name) if isinstance(module, QuantizedLinear) else None
