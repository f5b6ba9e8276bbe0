"""BdLoRA: A or B is block-diagonal, so that a layer cut over devices needs no exchange. arXiv:2510.23346, section 3.

    y = W x + s B A x,   A = diag(A_1 .. A_n) on the layers of target_modules_bd_a,  B likewise on those of _bd_b

    lora_A.weight (r, inp / n)  rows of block i: i r/n to (i + 1) r/n      or (r, inp)
    lora_B.weight (out, r)                                                 or (out, r / n), blocks of out / n rows
Merges. A block-diagonal B has no lora_bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kinds import Spec
from ..site import Site
from ..view import View
from .lora import LoraFactors, lora_bias_delta, lora_check, lora_tensors


def _blocked(cfg: Any, site: Site) -> str:
    """Which factor is block-diagonal on this layer: "A", "B" or ""."""
    bd = cfg.use_bdlora
    for factor, names in (("A", bd.target_modules_bd_a), ("B", bd.target_modules_bd_b)):
        if any(name in site.name for name in names or ()):
            return factor
    return ""


def _diagonal(blocks: Tensor, n: int) -> Tensor:
    """(rows, k) as n blocks of rows / n -> (rows, n k), each block in its own columns."""
    apart = blocks.unflatten(0, (n, -1))
    eye = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    return (apart[:, :, None] * eye[:, None, :, None]).flatten(2).flatten(0, 1)


class BdLoRA(LoraFactors):
    sites = frozenset({"linear"})
    example: ClassVar[dict[str, Any]] = {"use_bdlora": {"nblocks": 2, "match_strict": False}}

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)
        bd, factor = cfg.use_bdlora, _blocked(cfg, site)
        if not factor and bd.match_strict:
            raise ValueError(
                f"Target {site.name} matches neither A nor B block-diagonal patterns. "
                "If this is intentional, set match_strict=False in BdLoraConfig during initialization. "
                f"(target_modules_bd_a={bd.target_modules_bd_a}, target_modules_bd_b={bd.target_modules_bd_b})"
            )
        if cfg.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"use_bdlora on {site!r}: init_lora_weights={cfg.init_lora_weights!r} has no block-diagonal form; use "
                "True, False or 'gaussian'"
            )
        inner, outer = (site.inp, cfg.r) if factor == "A" else (cfg.r, site.out)
        if factor and (bd.nblocks < 1 or inner % bd.nblocks or outer % bd.nblocks):
            raise ValueError(
                f"use_bdlora on {site!r}: the sizes of {factor}, {inner} and {outer}, are not divisible by "
                f"nblocks={bd.nblocks}"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        out, factor = lora_tensors(cfg, site), _blocked(cfg, site)
        if factor:
            key = f"lora_{factor}.weight"
            rows, columns = out[key].shape
            out[key] = replace(out[key], shape=(rows, columns // cfg.use_bdlora.nblocks))
        if factor == "B":
            out.pop("lora_B.bias", None)
        return out

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        if cfg.init_lora_weights == "gaussian":
            nn.init.normal_(p.lora_A, std=1 / cfg.r)
        else:
            nn.init.kaiming_uniform_(p.lora_A, a=0.0 if _blocked(cfg, p.site) == "A" else 5**0.5)
        if cfg.init_lora_weights is False:
            nn.init.kaiming_uniform_(p.lora_B, a=5**0.5)
        else:
            nn.init.zeros_(p.lora_B)
        if p.has("lora_B_bias"):
            p.fill("lora_B_bias", torch.zeros_like(p.lora_B_bias))
        return None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        factor, n = _blocked(p.cfg, p.site), p.cfg.use_bdlora.nblocks
        B = _diagonal(p.lora_B, n) if factor == "B" else p.lora_B
        return B, _diagonal(p.lora_A, n) if factor == "A" else p.lora_A

    def bias_delta(self, p: View) -> Tensor | None:
        return lora_bias_delta(p) if p.has("lora_B_bias") else None
