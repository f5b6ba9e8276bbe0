"""OSF: the small singular directions of the weight are trained, orthogonally to the large ones.
Nayak et al. 2025, arXiv:2504.07097, section 3.

    W = U_h S_h V_h + U_l S_l V_l;   W' = W - (U_l S_l V_l at the start) + U_l S_l V_l

    osf_svd_params.U_low (out, k), .S_low (k,), .V_low (k, inp)    k = min(out, inp) - effective rank
    osf_start (out, inp), osf_U_high, osf_S_high, osf_V_high       frozen, found again in the base on loading

The gradients of U_low and V_low lose their part along U_h and V_h, in the backward pass itself: no hooks, and any
optimizer. Several adapters add their changes. Merges. Departures from peft: unmerging works, the forward pass of
several adapters is that of their merge, transformers' Conv1D is adapted (peft passes over it in silence).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..errors import AdapterError
from ..kernels import plain_autograd
from ..kinds import Additive, Spec
from ..osf_kernels import Outside, singular
from ..site import Site
from ..view import View


@dataclass
class OSFConfig(AdapterConfig):
    """effective_rank: singular directions that stay as they are; a share of all where not above 1; None: half.

    rank_pattern: {layer name or regex: effective_rank}. target_svd_config: part of the file format, without effect.
    init_weights: False draws the trained directions at random, for tests.
    """

    effective_rank: int | float | None = None
    rank_pattern: dict | None = None
    init_weights: bool | None = True
    target_svd_config: dict | None = None
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    PATTERNS = (("rank_pattern", "effective_rank"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OSF"


def kept(cfg: OSFConfig, site: Site) -> int:
    """How many of the layer's singular directions are frozen."""
    full, asked = min(site.out, site.inp), cfg.effective_rank
    if asked is None:
        return full // 2
    return min(full, int(asked * full) if isinstance(asked, float) and asked <= 1 else int(asked))


def by_factors(p: View, x: Tensor) -> bool:
    """Whether passing x through the factors costs less than a weight made of them: products of both, per vector."""
    (out, inp), k, tokens = (p.site.out, p.site.inp), len(p.osf_svd_params_S_low), x.numel() // p.site.inp
    high = len(p.osf_S_high)
    factors = (2 * high + 3 * k) * (out + inp) * tokens
    return factors < 3 * out * inp * (tokens + k) + high * k * (out + inp)


class OSF(Additive):
    Config = OSFConfig
    prefix = "osf_svd_params"
    defaults = "osf"
    by_weight = True
    exempt: ClassVar[dict[str, str]] = {
        "gradcheck": "the gradient is projected (section 3); test_osf_gradient_is_the_projected_one checks it",
    }

    def check(self, cfg: Any, site: Site) -> None:
        if kept(cfg, site) <= 0:
            raise AdapterError(
                f"{site!r}: `effective_rank` should be a positive integer value but the value passed is "
                f"{cfg.effective_rank!r}, which keeps {kept(cfg, site)} directions"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        h = kept(cfg, site)
        k = min(site.out, site.inp) - h
        frozen: dict[str, tuple[int, ...]] = {"osf_start": (site.out, site.inp), "osf_S_high": (h,)}
        frozen |= {"osf_U_high": (site.out, h), "osf_V_high": (h, site.inp)}
        return {
            "osf_svd_params.U_low": Spec((site.out, k), raw=True),
            "osf_svd_params.S_low": Spec((k,), raw=True),
            "osf_svd_params.V_low": Spec((k, site.inp), raw=True),
            **{key: Spec(shape, train=False, save=False, raw=True) for key, shape in frozen.items()},
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        low = self.split(p, cfg, weight())
        for key, value in zip(("U_low", "S_low", "V_low"), low, strict=True):
            p.fill(f"osf_svd_params_{key}", torch.randn_like(value) if cfg.init_weights is False else value)
        return None

    def restore(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        self.split(p, cfg, weight().detach())

    def split(self, p: View, cfg: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill the frozen tensors; returns U_l, S_l, V_l of the base."""
        h = kept(cfg, p.site)
        U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
        p.fill("osf_U_high", U[:, :h])
        p.fill("osf_S_high", S[:h])
        p.fill("osf_V_high", V[:h])
        p.fill("osf_start", (U[:, h:] * S[h:]) @ V[h:])
        return U[:, h:], S[h:], V[h:]

    def delta(self, p: View) -> Tensor:
        U = Outside.apply(p.osf_svd_params_U_low, p.osf_U_high)
        V = Outside.apply(p.osf_svd_params_V_low.mT, p.osf_V_high.mT).mT
        change = (U * p.osf_svd_params_S_low) @ V - p.osf_start
        return (change * p.scaling).to(p.dtype or change.dtype)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        p = ps[0]
        one = len(ps) == 1 and not args and not kwargs and p.scaling == 1
        if not (one and plain_autograd(x) and base.exact_for(x) and by_factors(p, x)):
            return super().forward(ps, x, base, args, kwargs)
        U, S, V = p.osf_svd_params_U_low, p.osf_svd_params_S_low, p.osf_svd_params_V_low
        if not U.dtype == p.osf_U_high.dtype == x.dtype:
            return super().forward(ps, x, base, args, kwargs)
        return singular(x, p.osf_U_high, p.osf_S_high, p.osf_V_high, U, S, V, base.bias())  # no base product
