"""KaSA: the base without its weakest directions, and a change with singular values of its own. Wang et al. 2024,
arXiv:2412.06071, sections 3.1 to 3.3.

    y = W' x + s B diag(d) A x,   W' = W less its r smallest singular components
    loss + beta sum |d|^2 + gamma sum (||B^T B - I|| + ||A A^T - I||), added by veneer's trainers

    lora_A.weight (r, inp)   lora_B.weight (out, r)   lora_diag (r,)
Merges. The base stays cut when the adapter is off or unloaded, and so a model takes either KaSA adapters or others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import inits
from ..kinds import Spec
from ..site import Site
from ..view import View
from .lora import LoraFactors, lora_check, lora_tensors


class KaSA(LoraFactors):
    sites = frozenset({"linear"})
    exclusive = True
    example: ClassVar[dict[str, Any]] = {"kasa_config": {}}
    exempt: ClassVar[dict[str, str]] = {
        "identity at init": "the base loses its r smallest singular components when the adapter is made",
    }

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)
        if cfg.r >= min(site.out, site.inp):
            raise ValueError(
                f"KaSA requires `r` ({cfg.r}) to be smaller than min(in_features, out_features) "
                f"({min(site.out, site.inp)}) so that at least one singular component of the base weight is preserved "
                f"after truncation. ({site!r})"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {**lora_tensors(cfg, site), "lora_diag": Spec((cfg.r,))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        base = inits.initial(p, cfg, weight)
        W = weight() if base is None else base
        p.fill("lora_diag", torch.randn_like(p.lora_diag))
        U, S, Vh = torch.linalg.svd(inits.matrix(W, p), full_matrices=False)
        if S[-cfg.r] <= S[0] * 1e-6:  # cut already, by another KaSA adapter of this model
            return base
        S[-cfg.r :] = 0
        return ((U * S) @ Vh).to(W.dtype)

    def changes_base(self, cfg: Any) -> bool:
        return True

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        return p.lora_B * p.lora_diag, p.lora_A

    def extra_loss(self, ps: Sequence[View]) -> Tensor | None:
        cfg = ps[0].cfg.kasa_config
        total = 0.0
        for p in ps:
            eye = torch.eye(p.cfg.r, dtype=p.lora_A.dtype, device=p.lora_A.device)
            apart = torch.linalg.norm(p.lora_B.T @ p.lora_B - eye) + torch.linalg.norm(p.lora_A @ p.lora_A.T - eye)
            total = total + cfg.beta * p.lora_diag.square().sum() + cfg.gamma * apart
        return total  # type: ignore[return-value]
