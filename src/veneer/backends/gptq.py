"""GPTQ and AWQ as gptqmodel runs them (transformers loads both through it): codes, scales and zeros in groups of
inputs. Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978.
"""

from __future__ import annotations

from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from torch import nn

from ..site import Site
from .quantised import AskedSite


class GptqSite(AskedSite):
    library = "gptqmodel"
    names = ("qweight", "bias")

    @property
    def dtype(self) -> torch.dtype:
        module: Any = self.module
        return module.scales.dtype


def site_of(module: nn.Module, name: str) -> Site | None:
    return GptqSite(module, name) if isinstance(module, BaseQuantLinear) else None
