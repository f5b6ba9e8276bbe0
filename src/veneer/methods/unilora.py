"""Uni-LoRA: every entry of every layer's A and B is one of a few trained numbers, scaled. 2025, arXiv:2506.00799,
section 3.

    y = W x + B A x,   A_ij = theta[index_A_ij] scale_A_ij,   B_ij = theta[index_B_ij] scale_B_ij

    base_model.unilora_theta_d (d,)                     trained, one for all layers
    unilora_indices_A, unilora_scales_A (r, inp)        frozen; in the file with save_indices
    unilora_indices_B, unilora_scales_B (out, r)

The indices are one random balanced assignment over all layers' entries, A before B and in model order, from
proj_seed; a scale is 1 / sqrt(how often its number is used), so that the map keeps lengths. The change is small at
the start but not zero: at theta = 0 there is no gradient. Merges.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..kinds import LowRank, Spec
from ..site import Site


@dataclass
class UniLoraConfig(AdapterConfig):
    """r: rank. theta_d_length: trained numbers. proj_seed: the assignment's seed. save_indices: put it into the file.

    unilora_dropout: on the adapter's input. bias: "none", "all" or "unilora_only". init_theta_d_bound: theta starts
    uniform within it. init_weights: False starts theta normal, for tests.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "UNILORA"
        for key in ("r", "theta_d_length"):
            if getattr(self, key) <= 0:
                raise ValueError(f"`{key}` should be a positive integer, got {getattr(self, key)}.")
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"`init_theta_d_bound` should be a positive float, got {self.init_theta_d_bound}.")


def assignment(n: int, d: int, seed: int) -> Tensor:
    """(n,) indices below d, each used n // d or n // d + 1 times, in random order."""
    import numpy as np

    generator = np.random.default_rng(seed)
    rest = generator.choice(d, n % d, replace=False) if n % d else np.arange(0)
    return torch.from_numpy(generator.permutation(np.concatenate([np.repeat(np.arange(d), n // d), rest])))


class UniLoRA(LowRank):
    Config = UniLoraConfig
    prefix = "unilora_"
    dropout = "unilora_dropout"
    example: ClassVar[dict[str, Any]] = {"theta_d_length": 64}
    exempt: ClassVar[dict[str, str]] = {
        "identity at init": "theta starts random (section 3); at zero neither factor has a gradient",
    }

    def by_place(self, cfgs: Sequence[Any], sites: Sequence[Site]) -> Sequence[Any]:
        sizes = [n for cfg, s in zip(cfgs, sites, strict=True) for n in (cfg.r * s.inp, cfg.r * s.out)]
        d = cfgs[0].theta_d_length
        index = assignment(sum(sizes), d, cfgs[0].proj_seed)
        scale = torch.bincount(index, minlength=d).clamp(min=1).float().rsqrt()
        made, pieces = [], index.split(sizes)
        for i, (cfg, site) in enumerate(zip(cfgs, sites, strict=True)):
            own = copy.copy(cfg)
            A, B = pieces[2 * i].reshape(cfg.r, site.inp), pieces[2 * i + 1].reshape(site.out, cfg.r)
            own.drawn = {"indices_A": A, "indices_B": B, "scales_A": scale[A], "scales_B": scale[B]}
            made.append(own)
        return made

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        d, bound = cfg.theta_d_length, cfg.init_theta_d_bound
        theta = torch.empty(d).uniform_(-bound, bound) if cfg.init_weights else torch.randn(d)
        return {"unilora_theta_d": Spec((d,), value=theta)}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        drawn: dict[str, Tensor] = cfg.drawn
        return {
            f"unilora_{k}": Spec(tuple(t.shape), train=False, save=cfg.save_indices, value=t, dtype=t.dtype)
            for k, t in drawn.items()
        }

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        theta = p.unilora_theta_d

        def spread(index: Tensor, scales: Tensor) -> Tensor:
            return theta.index_select(0, index.flatten()).view(index.shape) * scales

        return spread(p.unilora_indices_B, p.unilora_scales_B), spread(p.unilora_indices_A, p.unilora_scales_A)
