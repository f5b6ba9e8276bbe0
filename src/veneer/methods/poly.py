"""Poly: each task mixes low-rank skills, all layers by weights of their own. Ponti et al. 2022, arXiv:2202.13914,
section 2; with n_splits > 1 each slice of the features is mixed apart (MHR: Caccia et al. 2022, arXiv:2211.03831).

    y = W x + B_t A_t x / r,   A_t = sum_s m[t, s] A_s,  B_t likewise,  m[t] = sigmoid(Z[t]) / sum_s sigmoid(Z[t, s])

    poly_router.module_logits (n_tasks, n_splits * n_skills)       Z; in training sigmoid of Z plus logistic noise
    poly_lora_A (n_splits, n_skills, inp / n_splits, r)
    poly_lora_B (n_splits, n_skills, r, out / n_splits)

The task of each row comes with the call: model(**batch, task_ids=ids), model.generate(..., task_ids=ids). With one task
it may be left out. Rows of one batch may be of different tasks, so there is no weight to merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..context import per_row
from ..kinds import Routed, Spec
from ..site import Site
from ..view import View


@dataclass
class PolyConfig(AdapterConfig):
    """r: rank of each skill. n_tasks, n_skills: how many. n_splits: slices of the features that are mixed apart.

    init_weights: False draws B as well, for tests. poly_type: "poly" is the only one.
    """

    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "POLY"


class Poly(Routed):
    Config = PolyConfig
    prefix = "poly_"
    reads = frozenset({"task_ids"})
    exempt: ClassVar[dict[str, str]] = {
        "forward == merged": "the weight depends on each row's task, so no single weight is the forward's",
    }

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
        if cfg.poly_type != "poly":
            raise ValueError(
                f"Unsupported poly_type: {cfg.poly_type}. Currently, only the following types are supported: `poly`."
            )
        for key in ("n_tasks", "n_skills", "n_splits"):
            if getattr(cfg, key) < 1:
                raise ValueError(f"{key}={getattr(cfg, key)} on {site!r}: must be at least 1")
        if site.inp % cfg.n_splits or site.out % cfg.n_splits:
            raise ValueError(f"n_splits={cfg.n_splits} on {site!r}: it must divide both sizes of the layer")

    def check_call(self, cfg: Any, data: dict[str, Any]) -> None:
        if "task_ids" not in data:
            return
        ids = torch.as_tensor(data["task_ids"])
        ids = data["task_ids"] = ids[:, 0] if ids.dim() == 2 and ids.shape[1] == 1 else ids  # one a row, as a column
        if ids.is_floating_point() or ids.dim() != 1:
            raise ValueError(f"task_ids must be one integer a row, not {ids.dtype} of shape {tuple(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= cfg.n_tasks:
            wrong = low if low < 0 else high
            raise ValueError(f"Only {cfg.n_tasks} tasks available. Found task id = {wrong}")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        q, s, r = cfg.n_splits, cfg.n_skills, cfg.r
        return {
            "poly_router.module_logits": Spec((cfg.n_tasks, q * s)),
            "poly_lora_A": Spec((q, s, site.inp // q, r)),
            "poly_lora_B": Spec((q, s, r, site.out // q)),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        A, B = p.poly_lora_A, p.poly_lora_B
        bound = 1 / math.sqrt(A.shape[2])
        p.fill("poly_router_module_logits", torch.empty_like(p.poly_router_module_logits).uniform_(-1e-3, 1e-3))
        p.fill("poly_lora_A", torch.empty_like(A).uniform_(-bound, bound))
        limit = 0.0 if cfg.init_weights else 1 / math.sqrt(cfg.r)
        p.fill("poly_lora_B", torch.empty_like(B).uniform_(-limit, limit))
        return None

    def side(self, p: View, x: Tensor) -> Tensor:
        mix = self.mixture(p, x)
        A = torch.einsum("...qs,qsdr->...qdr", mix, p.poly_lora_A).flatten(-3, -2)  # (rows, inp, r)
        B = torch.einsum("...qs,qsrd->...rqd", mix, p.poly_lora_B).flatten(-2)  # (rows, r, out)
        h = x.reshape(*mix.shape[:-2], -1, x.shape[-1])
        return ((h @ A) @ (B / p.cfg.r)).reshape(*x.shape[:-1], B.shape[-1])

    def mixture(self, p: View, x: Tensor) -> Tensor:
        """How much of each skill each row takes, (rows, n_splits, n_skills); sums to one over skills."""
        logits = p.poly_router_module_logits
        ids = p.data.get("task_ids")
        if ids is None and p.cfg.n_tasks > 1:
            raise ValueError(f"task_ids should not be None: {p.site!r} knows {p.cfg.n_tasks} tasks; give one id a row")
        if ids is None:
            z = logits.expand(x.shape[0], -1) if p.training else logits[0]
        else:
            ids = ids.to(logits.device)
            z = logits[per_row(ids, x.shape[0]) if ids.dim() else ids]
        if p.training:
            u = torch.rand_like(z).clamp(torch.finfo(z.dtype).eps, 1 - torch.finfo(z.dtype).eps)
            z = z + u.log() - (-u).log1p()
        skills = torch.sigmoid(z).unflatten(-1, (p.cfg.n_splits, p.cfg.n_skills))
        return skills / (skills.sum(-1, keepdim=True) + 1e-12)
