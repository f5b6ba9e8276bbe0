"""LN tuning: the layer norms' own weights are trained. Zhao et al. 2023, arXiv:2312.11420, section 3.

    y = norm(x; w', b'),   w', b' copies of the norm's w, b, trained

    ln_tuning_layers.<name>    one for each parameter and stored statistic of the module, its shape and dtype

Works on every module that holds its parameters itself. Merges: the module takes the copy's weight and bias.
With several active adapters the last one's copy runs (peft refuses).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..errors import AdapterError, CannotMerge
from ..kinds import Replace, Weights
from ..site import Site
from ..view import View


@dataclass
class LNTuningConfig(AdapterConfig):
    """target_modules: the norms; by architecture where None."""

    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LN_TUNING"


class LNTuning(Replace):
    Config = LNTuningConfig
    sites = frozenset({"module"})
    prefix = "ln_tuning_"
    container = "ln_tuning_layers"
    defaults = "ln_tuning"

    def check(self, cfg: Any, site: Site) -> None:
        kind, everything = type(site.module).__name__, list(site.module.parameters())
        if not everything:
            raise AdapterError(f"{site.name}: this {kind} has no parameters to train; take it out of target_modules")
        if len(everything) != len(list(site.module.parameters(recurse=False))):
            raise AdapterError(
                f"{site.name}: this {kind} holds modules with parameters of their own; name those instead"
            )

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        p = ps[-1]
        mine, base = p.copy_of_module(self.container), p.site.module
        names = {name for name, _ in mine.named_parameters()}
        if "weight" not in names or names - {"weight", "bias"}:
            raise CannotMerge(f"{p.site!r}: only weight and bias can be merged, and it has {', '.join(sorted(names))}")
        stats = dict(base.named_buffers())
        if any(not torch.equal(t, stats[n]) for n, t in mine.named_buffers()):
            raise CannotMerge(f"{p.site!r}: its copy has collected statistics of its own; keep the adapter unmerged")
        return super().merged(ps, W, b)
