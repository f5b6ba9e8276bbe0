"""PEANuT: the change is a small network's reading of the frozen weight. Zhong et al. 2024, arXiv:2410.01870, section 3.

    W' = W + scaling * B h,   h = f(... f(A W) ...),   f an activation

    peanut_A.weight (r, out)   peanut_B.weight (out, r), starts at zero
    peanut_encoders.i.weight, peanut_decoders.i.weight (r, r)     i below depth

Each encoder takes h to f(E h); then each decoder takes h to f(D h) plus what the encoder of its mirror place was
given. The change has rank r given W and is never formed. Merges. Beyond peft: transformers' Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View


@dataclass
class PeanutConfig(AdapterConfig):
    """r: width of the network. depth: pairs of hidden layers beside A and B. act_fn: a name of transformers' ACT2FN.

    scaling: a factor on the change. init_weights: False draws B at random too, for tests.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PEANUT"
        if self.r <= 0:
            raise ValueError(f"`r` must be a positive integer, got {self.r}")
        if self.depth < 0:
            raise ValueError(f"`depth` must not be negative, got {self.depth}")
        activation(self.act_fn)


@cache
def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An elementwise function by its name in transformers; raises ValueError for another one."""
    from transformers.activations import ACT2FN

    names = sorted(n for n in ACT2FN if n not in ("softmax", "gelu_python_softmax"))
    if name not in names:
        raise ValueError(f"Unsupported `act_fn` {name!r}; one of {', '.join(names)}")
    return ACT2FN[name].requires_grad_(False).eval()


class PEANuT(LowRank):
    Config = PeanutConfig
    prefix = "peanut_"
    derived: ClassVar[dict[str, Callable[[View], Any]]] = {"res_num": lambda p: p.cfg.depth}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        out = {"A": Spec((cfg.r, site.out), like="linear"), "B": Spec((site.out, cfg.r), like="linear")}
        for part in ("encoder", "decoder"):
            for i in range(cfg.depth):
                out[f"{part}_{i}"] = Spec((cfg.r, cfg.r), like="linear", file=f"peanut_{part}s.{i}.weight")
        return {f"peanut_{key}.weight": spec for key, spec in out.items()}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in p.where:
            value = torch.empty_like(getattr(p, key), dtype=torch.float32)
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            p.fill(key, value * 0 if key == "peanut_B" and cfg.init_weights else value)
        return None

    def scaling(self, cfg: Any) -> float:
        return cfg.scaling

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        f, A = activation(p.cfg.act_fn), p.peanut_A
        h, given = f(A @ p.site.weight().to(A.dtype)), []
        for i in range(p.cfg.depth):
            given.append(h)
            h = f(getattr(p, f"peanut_encoder_{i}") @ h)
        for i in range(p.cfg.depth):
            h = f(getattr(p, f"peanut_decoder_{i}") @ h) + given.pop()
        return p.peanut_B, h
