"""IA3: a trained factor for each feature. Liu et al. 2022, arXiv:2205.05638, section 3.3.

    y = l * (W x + b)          a feed-forward module:   y = W (l * x) + b

    ia3_l (out, 1), on a convolution (1, out, 1, ...); feed-forward (1, inp), (1, inp, 1, ...); starts at one

Merges. Beyond peft: one-dimensional convolutions, and an embedding's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..defaults import default_targets, target_table
from ..errors import AdapterError
from ..kinds import Gate, Spec
from ..patterns import suffix_or_pattern
from ..site import Site
from ..view import View


@dataclass
class IA3Config(AdapterConfig):
    """feedforward_modules: those of target_modules that are scaled at their input; the rest at their output.

    Names or a regex, as target_modules. init_ia3_weights: False draws the factors at random, for tests.
    """

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "IA3"
        if isinstance(self.feedforward_modules, list | tuple):
            self.feedforward_modules = set(self.feedforward_modules)  # type: ignore[assignment]
        targets, feedforward = self.target_modules, self.feedforward_modules
        if not (isinstance(targets, set) and isinstance(feedforward, set)):
            return
        ends = [f".{t}" for t in targets]  # "all-linear" is kept as whole paths, of which a name is the end
        if extra := [n for n in sorted(feedforward) if not any(e.endswith(f".{n}") for e in ends)]:
            raise ValueError(
                "`feedforward_modules` should be a subset of `target_modules`; not among the targets: "
                + ", ".join(extra)
            )


def is_feedforward(cfg: IA3Config, site: Site) -> bool:
    """Whether this layer is scaled at its input."""
    wanted = cfg.feedforward_modules
    patterns = wanted if wanted is None or isinstance(wanted, str) else tuple(wanted)
    return suffix_or_pattern(patterns, "feedforward_modules")(site.name)


class IA3(Gate):
    Config = IA3Config
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "ia3_"
    defaults = "ia3"
    example: ClassVar[dict[str, Any]] = {"feedforward_modules": ["down_proj"]}

    def prepare(self, cfg: Any, model: torch.nn.Module, model_type: str | None) -> None:
        known = cfg.target_modules is None or model_type in target_table("ia3_feedforward")
        super().prepare(cfg, model, model_type)
        if cfg.feedforward_modules is None:
            if not known:
                raise ValueError(
                    "Please specify `feedforward_modules` in `peft_config`: those of target_modules that are "
                    "scaled at their input, [] for none"
                )
            found = default_targets(model, model_type, "ia3_feedforward")
            cfg.feedforward_modules = found if isinstance(found, str) else set(found)

    def check(self, cfg: Any, site: Site) -> None:
        if site.kind == "embedding" and is_feedforward(cfg, site):
            raise AdapterError(f"{site!r} is an embedding, its input is a token id; take it out of feedforward_modules")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        inside = is_feedforward(cfg, site)
        n = site.inp if inside else site.out
        if site.kernel:
            return {"ia3_l": Spec((1, n, *(1 for _ in site.kernel)))}
        return {"ia3_l": Spec((1, n) if inside else (n, 1))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        drawn = torch.randn_like(p.ia3_l)  # taken either way, as peft does: one seed shuffles the data alike in both
        p.fill("ia3_l", torch.ones_like(drawn) if cfg.init_ia3_weights else drawn)
        return None

    def gates(self, p: View) -> tuple[bool, bool]:
        inside = is_feedforward(p.cfg, p.site)
        return inside, not inside

    def pre(self, p: View, x: Tensor) -> Tensor:
        return x * p.ia3_l.flatten()

    def post(self, p: View, y: Tensor) -> Tensor:
        return y * p.ia3_l.flatten()
