"""GLoRA: a general formula for changes to weight and bias. Chavan et al. 2023, arXiv:2306.07967, equation 10.

    W' = W + W * A + B,   b' = b + b * D + E + W C

    A, B (out, inp)   "lora": glora_A.Xd (out, r) times .Xu (r, inp);  "vector": .X (out, 1);  "constant": .X (1,)
    C (inp, 1)        "lora": glora_C.Xd (inp, r) times .Xu (r, 1);    "vector": .X (inp, 1)
    D, E (out,)       "vector": glora_D.X (out,);                      "constant": .X (1,)

"none" leaves a part out: its tensor is .zeros, frozen. All start at zero (Xd is zero, Xu random). On a layer
without a bias C, D and E are left out, as files have it. Merges. Beyond peft: transformers' Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, veneer_field
from ..errors import AdapterError
from ..hadamard_kernels import modulated
from ..kinds import Additive, Spec, Weights
from ..site import Site
from ..view import View

CHOICES = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclass
class GloraConfig(AdapterConfig):
    """r: rank of the "lora" parts. config_A_B, config_C, config_D_E: the form of each part, see above.

    init_weights: False draws every part at random, for tests.
    """

    r: int = 8
    bias: str = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "GLORA"
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Invalid {name} value: {getattr(self, name)!r}; one of {', '.join(known)}")


def forms(cfg: GloraConfig, site: Site) -> dict[str, str]:
    """Part -> its form on this layer."""
    weight, bias = cfg.config_A_B, cfg.config_D_E
    if site.bias() is None:
        return {"A": weight, "B": weight, "C": "none", "D": "none", "E": "none"}
    return {"A": weight, "B": weight, "C": cfg.config_C, "D": bias, "E": bias}


class GLoRA(Additive):
    Config = GloraConfig
    prefix = "glora_"
    by_weight = True

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0 and "lora" in forms(cfg, site).values():
            raise AdapterError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        sizes = {"A": (site.out, site.inp), "B": (site.out, site.inp), "C": (site.inp, 1)}
        out: dict[str, Spec] = {}
        for part, form in forms(cfg, site).items():
            shape: tuple[int, ...] = sizes.get(part, (site.out,))
            if form == "lora":
                out[f"glora_{part}.Xd"] = Spec((shape[0], cfg.r))
                out[f"glora_{part}.Xu"] = Spec((cfg.r, shape[1]))
            elif form == "none":
                out[f"glora_{part}.zeros"] = Spec(shape, train=False)
            else:
                vector = shape if part in "CDE" else (site.out, 1)
                out[f"glora_{part}.X"] = Spec((1,) if form == "constant" else vector)
        return out

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in p.where:
            value = torch.zeros_like(getattr(p, key), dtype=torch.float32)
            if key.endswith("_Xu") or (key.endswith("_Xd") and not cfg.init_weights):
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            elif key.endswith("_X") and not cfg.init_weights:
                nn.init.normal_(value, std=0.02)
            p.fill(key, value)
        return None

    def part(self, p: View, name: str) -> Tensor | None:
        """One of A to E, shaped to broadcast; None where the config leaves it out."""
        form = forms(p.cfg, p.site)[name]
        if form == "none":
            return None
        if form == "lora":
            return getattr(p, f"glora_{name}_Xd") @ getattr(p, f"glora_{name}_Xu")
        return getattr(p, f"glora_{name}_X")

    def delta(self, p: View) -> Tensor:
        A, B = self.part(p, "A"), self.part(p, "B")
        W = p.site.weight()
        if A is None or B is None:
            return torch.zeros_like(W, dtype=p.dtype or W.dtype)
        return (W.to(A.dtype) * A + B) * p.scaling

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        if len(ps) != 1 or ps[0].cfg.config_A_B != "lora":
            return super().merged(ps, W, b)
        p = ps[0]
        B, A, D, C = p.glora_A_Xd, p.glora_A_Xu, p.glora_B_Xd, p.glora_B_Xu
        d = self.bias_delta(p)
        if d is not None:
            b = d if b is None else b + d
        return modulated(W, p.site.weight().to(A.dtype), B, A, D, C, p.scaling), b

    def bias_delta(self, p: View) -> Tensor | None:
        b, W = p.site.bias(), p.site.weight()
        if b is None:
            return None
        C, D, E = (self.part(p, name) for name in "CDE")
        total = torch.zeros_like(b, dtype=p.dtype or b.dtype)
        if C is not None:
            total = total + (W.to(C.dtype) @ C).squeeze(-1)
        if D is not None:
            total = total + b.to(D.dtype) * D
        if E is not None:
            total = total + E
        return total * p.scaling
