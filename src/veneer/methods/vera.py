"""VeRA: two frozen random projections for the whole model, two trained vectors a layer.
Kopiczko et al. 2023, arXiv:2310.11454, section 3.1.

    y = W x + diag(b) B diag(d) A x

    vera_lambda_d (r,)                starts at d_initial
    vera_lambda_b (out,)              starts at zero
    base_model.vera_A (r, max inp)    frozen, one for all layers; a layer reads its first inp columns
    base_model.vera_B (max out, r)    and its first out rows

Both projections follow from projection_prng_key, so a file without them (save_projection=False) is complete:
they are drawn again on loading. Merges. Adapters with different keys or ranks may stand side by side, each
with projections of its own; peft takes one key and one rank a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..kernels import mask_like
from ..kinds import LowRank, Spec
from ..scaled_kernels import vector_low_rank
from ..site import Site
from ..view import View


@dataclass
class VeraConfig(AdapterConfig):
    """r: rank, larger than LoRA's as only vectors are trained. projection_prng_key: the projections' seed.

    save_projection: put the projections into the file, which then does not depend on a random generator.
    vera_dropout: on the adapter's input. d_initial: first value of vera_lambda_d. bias: "none", "all" or
    "vera_only". init_weights: False draws vera_lambda_d at random, vera_lambda_b is one then; for tests.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "VERA"


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform within sqrt(6 / fan in); fan in is the second size."""
    bound = math.sqrt(2.0) * math.sqrt(3.0) / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _rounded(t: Tensor, sites: Sequence[Site]) -> Tensor:
    """Drawn in float32 and rounded to each dtype of the base, as files without projections expect."""
    dtypes = list(dict.fromkeys(s.dtype for s in sites if s.dtype.is_floating_point and s.dtype.itemsize > 1))
    for dtype in dtypes:
        t = t.to(dtype)
    return t.to(reduce(torch.promote_types, dtypes)) if dtypes else t


class VeRA(LowRank):
    Config = VeraConfig
    prefix = "vera_lambda_"
    dropout = "vera_dropout"
    defaults = "vera"

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        shapes = {"vera_A": (cfg.r, max(s.inp for s in sites)), "vera_B": (max(s.out for s in sites), cfg.r)}
        drawn = {key: _rounded(_kaiming_uniform(shape, generator), sites) for key, shape in shapes.items()}
        saved = cfg.save_projection
        return {k: Spec(tuple(v.shape), train=False, save=saved, value=v) for k, v in drawn.items()}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {"vera_lambda_b": Spec((site.out,)), "vera_lambda_d": Spec((cfg.r,))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        b, usual = p.vera_lambda_b, cfg.init_weights
        drawn = torch.randn_like(p.vera_lambda_d)  # taken either way, as peft does: one seed shuffles alike in both
        p.fill("vera_lambda_b", torch.zeros_like(b) if usual else torch.ones_like(b))
        p.fill("vera_lambda_d", torch.full_like(drawn, cfg.d_initial) if usual else drawn)
        return None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        B, A = p.vera_B[: p.site.out], p.vera_A[:, : p.site.inp]
        return p.vera_lambda_b[:, None] * B, p.vera_lambda_d[:, None] * A

    def side(self, p: View, x: Tensor) -> Tensor:
        """The vectors on activations, so that the frozen projections need no gradient."""
        B, A = p.vera_B[: p.site.out], p.vera_A[:, : p.site.inp]
        return p.site.up(p.site.down(x, A) * p.vera_lambda_d, B) * (p.vera_lambda_b * p.scaling)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        p = ps[0]
        if len(ps) > 1 or args or kwargs or not base.plain(x):
            return super().forward(ps, x, base, args, kwargs)
        rate, (W, b) = p.dropout_rate, (p.site.weight(), p.site.bias())
        keep = mask_like(x, rate) if rate else None
        B, A = p.vera_B[: p.site.out], p.vera_A[:, : p.site.inp]
        return vector_low_rank(x, W, b, A, B, p.vera_lambda_d, p.vera_lambda_b, p.scaling, keep, rate)
