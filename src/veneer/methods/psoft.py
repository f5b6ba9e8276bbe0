"""PSOFT: an orthogonal map inside the principal subspace of the weight. Wu et al. 2025, arXiv:2505.11235, section 4.

    y = W x + s B (diag(b) R diag(a) - I) A x,   s B A = the top r of W's singular value decomposition, s = alpha / r

    psoft_R.weight (r (r - 1) / 2,)          upper triangle of a skew-symmetric Q, R = (I + Q)(I - Q)^-1; starts at zero
                   (r, r)                    without psoft_orth: R itself, starts at I
    psoft_R.vector_b, psoft_R.vector_a (r,)  start at one; absent without psoft_mag_b, psoft_mag_a

With use_cayley_neumann R = (I + Q)(I + Q + Q^2 + ...). A and B are frozen and not in the file: they are decomposed
from the base's weight again on loading (psoft_svd="lowrank": by a randomised decomposition seeded with
random_seed). Merges. Beyond peft: transformers' Conv1D.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..errors import PeftWarning
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View
from .oft import cayley, cayley_neumann, skew

_CHOICES = {"ab_svd_init": ("pissa_init", "psoft_init"), "psoft_svd": ("full", "lowrank")}


@dataclass
class PsoftConfig(AdapterConfig):
    """r: size of the subspace. psoft_alpha: A and B are scaled such that psoft_alpha / r gives the weight back.

    ab_svd_init: "psoft_init" puts the singular values into B, "pissa_init" their roots into both. psoft_svd: "full",
    or "lowrank" with psoft_svd_lowrank_niter power iterations and random_seed. psoft_orth: R is orthogonal; False:
    any matrix. psoft_mag_b, psoft_mag_a: train scales after and before R. use_cayley_neumann,
    num_cayley_neumann_terms: a series instead of a linear solve; cayley_neumann_eps: largest norm of Q in it.
    psoft_dropout: on the adapter's input. init_weights: False starts R away from I, for tests.
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PSOFT"
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"`{key}` must be one of {list(known)}; got {getattr(self, key)!r}.")
        if self.num_cayley_neumann_terms <= 0:
            raise ValueError(
                f"`num_cayley_neumann_terms` must be a positive integer; got {self.num_cayley_neumann_terms}."
            )
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ValueError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {self.cayley_neumann_eps}.")
        self._warn_of_settings_without_effect()

    def _warn_of_settings_without_effect(self) -> None:
        acts = {
            "psoft_svd_lowrank_niter": (self.psoft_svd == "lowrank", "psoft_svd='lowrank'"),
            "num_cayley_neumann_terms": (self.use_cayley_neumann, "use_cayley_neumann=True"),
            "cayley_neumann_eps": (self.use_cayley_neumann, "use_cayley_neumann=True"),
        }
        for key, (used, where) in acts.items():
            if not used and getattr(self, key) != type(self).__dataclass_fields__[key].default:
                warnings.warn(f"`{key}` is only used when `{where}`.", PeftWarning, stacklevel=4)


def principal(W: Tensor, cfg: PsoftConfig) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, inp) with (alpha / r) B A the best approximation of W of rank r, float32."""
    W, r = W.float(), cfg.r
    if cfg.psoft_svd == "full":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        devices = [W.device] if W.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(cfg.random_seed)
            U, S, V = torch.svd_lowrank(W, q=r, niter=cfg.psoft_svd_lowrank_niter)
        Vh = V.mT
    S = S / (cfg.psoft_alpha / r)
    if cfg.ab_svd_init == "psoft_init":
        return U * S, Vh
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


class PSOFT(LowRank):
    Config = PsoftConfig
    prefix = "psoft_"
    dropout = "psoft_dropout"
    settings: ClassVar[frozenset[str]] = frozenset(
        {"psoft_orth", "psoft_mag_a", "psoft_mag_b", "use_cayley_neumann", "num_cayley_neumann_terms",
         "cayley_neumann_eps"}
    )  # fmt: skip

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` must be a positive integer; got {cfg.r}. ({site!r})")
        if cfg.r > min(site.inp, site.out):
            raise ValueError(
                f"`r` ({cfg.r}) must be less than or equal to min(in_features, out_features) "
                f"({site.inp}, {site.out}) ({site!r})"
            )
        if cfg.psoft_alpha == 0:
            raise ValueError(f"`psoft_alpha` must not be zero: the factors are divided by it ({site!r})")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        r = cfg.r
        out = {"psoft_R.weight": Spec((r * (r - 1) // 2,) if cfg.psoft_orth else (r, r), raw=True)}
        for side, on in (("b", cfg.psoft_mag_b), ("a", cfg.psoft_mag_a)):
            if on:
                out[f"psoft_R.vector_{side}"] = Spec((r,))
        out["psoft_A"] = Spec((r, site.inp), train=False, save=False)
        out["psoft_B"] = Spec((site.out, r), train=False, save=False)
        return out

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        R = torch.zeros_like(p.psoft_R) if cfg.psoft_orth else torch.eye(cfg.r)
        p.fill("psoft_R", R if cfg.init_weights else R + 0.1 * torch.randn_like(p.psoft_R))
        for key in ("psoft_R_vector_b", "psoft_R_vector_a"):
            if p.has(key):
                p.fill(key, torch.ones(cfg.r))
        self.restore(p, cfg, weight)
        return None

    def restore(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        B, A = principal(weight(), cfg)
        p.fill("psoft_B", B)
        p.fill("psoft_A", A)

    def scaling(self, cfg: Any) -> float:
        return cfg.psoft_alpha / cfg.r

    def rotation(self, p: View) -> Tensor:
        """diag(b) R diag(a), (r, r)."""
        R = p.psoft_R
        if p.cfg.psoft_orth:
            R = R if R.dtype == torch.float64 else R.float()
            Q = skew(R[None], p.cfg.r)[0]
            R = self.series(Q, p.cfg) if p.cfg.use_cayley_neumann else cayley(-Q)
        R = R.to(p.psoft_A.dtype)
        R = R * p.psoft_R_vector_a if p.has("psoft_R_vector_a") else R
        return p.psoft_R_vector_b[:, None] * R if p.has("psoft_R_vector_b") else R

    def series(self, Q: Tensor, cfg: PsoftConfig) -> Tensor:
        if cfg.cayley_neumann_eps is not None:
            Q = Q * (cfg.cayley_neumann_eps / Q.norm().clamp(min=cfg.cayley_neumann_eps))
        return cayley_neumann(Q, cfg.num_cayley_neumann_terms)

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        R = self.rotation(p)
        return p.psoft_B, (R - torch.eye(len(R), dtype=R.dtype, device=R.device)) @ p.psoft_A
