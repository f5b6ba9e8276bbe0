"""SuperTuning: a few entries of the weight are trained, those of largest magnitude; with r also a LoRA (Supra).
arXiv:2607.09287.

    W' = W + sparse + (lora_alpha / r) B A

    supertuning_values (k,)     the entries' changes, start at zero; k = floor((1 - sparsity) * out * inp)
    supertuning_indices (k,)    int32, places in W.flatten(), by magnitude
    supertuning_lora_A.weight (r, inp), supertuning_lora_B.weight (out, r)    with r; B starts at zero

Without save_precomputed_indices the file holds no places: they are found again in the base on loading.
lora_dropout acts on the LoRA's input alone. Merges. Beyond peft: transformers' Conv1D.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig, veneer_field
from ..errors import AdapterError
from ..kinds import Additive, Spec, Weights
from ..site import Site
from ..view import View


@dataclass
class SupertuningConfig(AdapterConfig):
    """sparsity: share of entries left as they are, in [0, 1). select_top: the largest entries, else the smallest.

    r, lora_alpha: add a LoRA; lora_alpha is 2 r where not given. init_weights: False draws at random, for tests.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SUPERTUNING"
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0.0, 1.0), got {self.sparsity}")
        if self.r is not None and self.r <= 0:
            raise ValueError(f"r must be a positive integer or None, got {self.r}")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError(
                f"lora_alpha is set but r is None: lora_alpha={self.lora_alpha} scales a LoRA of rank r; give an r, or "
                "leave lora_alpha out"
            )
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not self.save_precomputed_indices:
            warnings.warn(
                "save_precomputed_indices=False: the places of the trained entries are found again on loading, in "
                "the magnitudes of a base that must be the same as now",
                stacklevel=3,
            )


def entries(cfg: SupertuningConfig, site: Site) -> int:
    return int((1.0 - cfg.sparsity) * site.out * site.inp)


class SuperTuning(Additive):
    Config = SupertuningConfig
    prefix = "supertuning_"
    by_weight = True
    settings = frozenset({"lora_alpha", "r"})

    def check(self, cfg: Any, site: Site) -> None:
        if entries(cfg, site) < 1:
            raise AdapterError(f"{site!r}: sparsity={cfg.sparsity} leaves no trainable entries; lower it")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        k = entries(cfg, site)
        saved = cfg.save_precomputed_indices
        places = Spec((k,), train=False, save=saved, dtype=torch.int32)
        out = {"supertuning_values": Spec((k,)), "supertuning_indices": places}
        if cfg.r is not None:
            out["supertuning_lora_A.weight"] = Spec((cfg.r, site.inp), like="linear")
            out["supertuning_lora_B.weight"] = Spec((site.out, cfg.r), like="linear")
        return out

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        values = p.supertuning_values
        p.fill("supertuning_values", torch.zeros_like(values) if cfg.init_weights else torch.randn_like(values))
        self.find(p, cfg, weight)
        for key in ("supertuning_lora_A", "supertuning_lora_B"):
            if p.has(key):
                value = torch.empty_like(getattr(p, key), dtype=torch.float32)
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
                p.fill(key, value * 0 if key.endswith("B") and cfg.init_weights else value)
        return None

    def restore(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        if not cfg.save_precomputed_indices:
            self.find(p, cfg, weight)

    def find(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        size = weight().detach().abs().flatten()
        p.fill("supertuning_indices", size.topk(entries(cfg, p.site), largest=cfg.select_top).indices)

    def onto(self, p: View, W: Tensor) -> Tensor:
        """W (out, inp) with the trained entries added, in one pass over it."""
        values = (p.supertuning_values * p.scaling).to(W.dtype)
        return W.reshape(-1).scatter_add(0, p.supertuning_indices.long(), values).reshape(W.shape)

    def sparse(self, p: View) -> Tensor:
        return self.onto(p, p.supertuning_values.new_zeros(p.site.out, p.site.inp))

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        for p in ps:
            pair, W = self.lora(p), self.onto(p, W)
            W = W if pair is None else torch.addmm(W, *pair)
        return W, b

    def lora(self, p: View) -> tuple[Tensor, Tensor] | None:
        """B, with the scaling, and A."""
        if p.cfg.r is None:
            return None
        return p.supertuning_lora_B * (p.cfg.lora_alpha / p.cfg.r * p.scaling), p.supertuning_lora_A

    def delta(self, p: View) -> Tensor:
        pair, sparse = self.lora(p), self.sparse(p)
        return sparse if pair is None else torch.addmm(sparse, *pair)

    def side(self, p: View, x: Tensor) -> Tensor:
        y, pair = p.site.op(x, self.sparse(p), None), self.lora(p)
        if pair is None:
            return y
        x = F.dropout(x, p.cfg.lora_dropout, p.training)
        return y + p.site.up(p.site.down(x, pair[1]), pair[0])

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        if not any(p.training and p.cfg.r and p.cfg.lora_dropout for p in ps):
            return super().forward(ps, x, base, args, kwargs)
        y = base(x, *args, **kwargs)
        for p in ps:
            y = y + self.side(p, x).to(y.dtype)
        return y
