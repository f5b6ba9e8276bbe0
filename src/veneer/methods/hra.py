"""HRA: a chain of r Householder reflections of the input. Yuan et al. 2024, arXiv:2405.17484, section 3.

    y = W H_1 H_2 ... H_r x + b,   H_i = I - 2 v_i v_i^T,   v_i = u_i / ||u_i||

    hra_u (inp, r)    columns in equal pairs at the start, which cancel; on a convolution (inp * kernel sizes, r)

apply_GS makes the columns orthogonal by Gram-Schmidt first; the chain is I - 2 V V^T then.
The chain is one product, I - V T V^T with T upper triangular, T^-1 = I / 2 + the part of V^T V above its diagonal
(Schreiber and Van Loan 1989, the compact WY form), so a step costs what a LoRA of the same rank does.
On a convolution it acts on the unfolded patch. The last active adapter acts first on x. Merges. Departures from
peft: under apply_GS the columns start independent, as pairs have no second direction (peft: NaN or noise);
groups, Conv1d, Conv3d and transformers' Conv1D work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import AdapterError
from ..kinds import Gate, Spec
from ..site import Site
from ..view import View


@dataclass
class HRAConfig(AdapterConfig):
    """r: number of reflections; even, so that the chain can start as the identity. apply_GS: orthogonal directions.

    init_weights: False draws all columns at random, for tests. bias: "none", "all" or "hra_only".
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "HRA"


def features(site: Site) -> int:
    """How many inputs one output reads: the columns of W.flatten(1)."""
    return site.inp // site.groups * math.prod(site.kernel)


class HRA(Gate):
    Config = HRAConfig
    sites = frozenset({"linear", "conv"})
    prefix = "hra_"
    last_first = True
    patches = True

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
        if cfg.apply_GS and cfg.r > features(site):
            raise AdapterError(f"{site!r}: apply_GS finds no r={cfg.r} orthogonal directions in {features(site)}")
        if cfg.r % 2 and cfg.init_weights and not cfg.apply_GS:
            warnings.warn(
                f"{site!r}: r={cfg.r} is odd, and an odd number of reflections is never the identity: the adapter "
                "starts by changing the model. Choose an even r",
                stacklevel=2,
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {"hra_u": Spec((features(site), cfg.r), raw=True)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        u = torch.empty_like(p.hra_u, dtype=torch.float32)
        if cfg.r % 2 or cfg.apply_GS or not cfg.init_weights:
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        else:
            half = u[:, : cfg.r // 2].contiguous()
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
            u = half.repeat_interleave(2, dim=1)
        p.fill("hra_u", u)
        return None

    def chain(self, p: View) -> tuple[Tensor, Tensor]:
        """V (inp, r) and M (r, inp) with H_1 ... H_r = I - V M, in float32 at least."""
        u = p.hra_u.to(torch.promote_types(p.hra_u.dtype, torch.float32))
        if p.cfg.apply_GS:
            V = torch.linalg.qr(u)[0]
            return V, 2 * V.mT
        V = u / u.norm(dim=-2, keepdim=True)
        inverse = torch.triu(V.mT @ V, 1) + 0.5 * torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
        return V, torch.linalg.solve_triangular(inverse, V.mT, upper=True)

    def pre(self, p: View, x: Tensor) -> Tensor:
        V, M = self.chain(p)
        return x - (x @ M.mT.to(x.dtype)) @ V.mT.to(x.dtype)

    def fold(self, p: View, W: Tensor) -> Tensor:
        V, M = self.chain(p)
        rows = W.flatten(1)
        return (rows - (rows @ V.to(W.dtype)) @ M.to(W.dtype)).reshape(W.shape)
