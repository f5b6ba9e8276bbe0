"""DoRA: the weight's direction by LoRA, its length trained. Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.

    W' = m * V / ||V||,   V = W + s B A;   ||V|| per output (per channel of a convolution), held constant in backward

    lora_A, lora_B           as LoRA's
    lora_magnitude_vector    (out,), (1, out, 1, ...) on a convolution; starts as ||W||

Reached by LoraConfig(use_dora=True). Merges. With two DoRA adapters active the changes W' - W are added, in the
forward pass as in the merged weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import inits
from ..errors import AdapterError
from ..kinds import Reweight, Spec
from ..layer import View
from ..site import Site
from .lora import DENSE, LoraConfig, lora_check, lora_factors, lora_scaling, lora_tensors


def _length(V: Tensor, site: Site) -> Tensor:
    """Norm of the weight for each output, shaped to divide it; an embedding's per column of its table."""
    return V.flatten(1).norm(dim=1).reshape(-1, *[1] * (V.dim() - 1))


class DoRA(Reweight):
    Config = LoraConfig
    sites = DENSE
    prefix = "lora_"
    dropout = "lora_dropout"
    exempt: ClassVar[dict[str, str]] = {
        "gradcheck": "the norm counts as a constant in the gradient (section 4.3); "
        "test_dora_gradient_with_the_norm_constant checks that one instead",
    }

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)
        if site.groups > 1:
            raise AdapterError(
                f"use_dora=True on {site!r}: with {site.groups} groups, W + B A has no weight of the layer's shape "
                f"and so "
                "no norm; take the layer out of target_modules or set use_dora=False"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        shape = (1, site.out, *(1 for _ in site.kernel)) if site.kernel else (site.out,)
        magnitude = Spec(shape, file="lora_magnitude_vector")
        return {**lora_tensors(cfg, site), "lora_magnitude_vector.weight": magnitude}

    def scaling(self, cfg: Any) -> float:
        return lora_scaling(cfg)

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        base = inits.initial(p, cfg, weight)
        W = weight() if base is None else base
        with torch.no_grad():
            length = _length(self.direction(p, W.float()), p.site)
        p.fill("lora_magnitude_vector", length.reshape(p.lora_magnitude_vector.shape))
        return base

    def changes_base(self, cfg: Any) -> bool:
        return inits.changes_base(cfg)

    def direction(self, p: View, W: Tensor) -> Tensor:
        B, A = lora_factors(p)
        return W + p.site.compose(B, A).to(W.dtype) * p.scaling

    def weight(self, p: View, W: Tensor) -> Tensor:
        V = self.direction(p, W)
        length = _length(V, p.site).detach()
        return V * (p.lora_magnitude_vector.reshape(length.shape) / length)
