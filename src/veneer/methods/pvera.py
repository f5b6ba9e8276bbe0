"""PVeRA: VeRA whose low-dimensional features are drawn from a learned normal distribution in training.
arXiv:2512.07703, section 3.

    y = W x + diag(b) B z,   (mu, log var) = diag(d) A x,   z = mu + exp(log var / 2) * noise,  noise ~ N(0, I)

    pvera_lambda_d (2 r,)                 starts at d_initial; the first half scales mu, the second log var
    pvera_lambda_b (out,)                 starts at zero
    base_model.pvera_A (2 r, max inp)     frozen, one for all layers; a layer reads its first inp columns
    base_model.pvera_B (max out, r)       and its first out rows

In training, and in inference with sample_at_inference, z is drawn; else z = mu. Merging takes z = mu: with
sample_at_inference that is the mean over draws. Both projections follow from projection_prng_key, as VeRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View
from .vera import _kaiming_uniform, _rounded


@dataclass
class PveraConfig(AdapterConfig):
    """r: rank, larger than LoRA's as only vectors are trained. projection_prng_key: the projections' seed.

    save_projection: put the projections into the file. pvera_dropout: on the adapter's input. d_initial: first value
    of pvera_lambda_d. bias: "none", "all" or "pvera_only". init_weights: False draws pvera_lambda_d at random,
    pvera_lambda_b is one then; for tests. sample_at_inference: draw in inference too. generator_seed: draw from a
    generator of each layer's own that starts at this seed; None: from the global one.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PVERA"


class PVeRA(LowRank):
    Config = PveraConfig
    prefix = "pvera_lambda_"
    dropout = "pvera_dropout"
    defaults = "pvera"
    settings: ClassVar[frozenset[str]] = frozenset({"sample_at_inference", "generator_seed"})

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        shapes = {"pvera_A": (2 * cfg.r, max(s.inp for s in sites)), "pvera_B": (max(s.out for s in sites), cfg.r)}
        drawn = {key: _rounded(_kaiming_uniform(shape, generator), sites) for key, shape in shapes.items()}
        saved = cfg.save_projection
        return {k: Spec(tuple(v.shape), train=False, save=saved, value=v) for k, v in drawn.items()}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {"pvera_lambda_b": Spec((site.out,)), "pvera_lambda_d": Spec((2 * cfg.r,))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        b, d, usual = p.pvera_lambda_b, p.pvera_lambda_d, cfg.init_weights
        p.fill("pvera_lambda_b", torch.zeros_like(b) if usual else torch.ones_like(b))
        p.fill("pvera_lambda_d", torch.full_like(d, cfg.d_initial) if usual else torch.randn_like(d))
        return None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        r = p.cfg.r
        B, A = p.pvera_B[: p.site.out], p.pvera_A[:r, : p.site.inp]
        return p.pvera_lambda_b[:, None] * B, p.pvera_lambda_d[:r, None] * A

    def side(self, p: View, x: Tensor) -> Tensor:
        if not (p.training or p.cfg.sample_at_inference):
            return super().side(p, x)
        # scales on the activations: the frozen projections then need no gradient
        mu, log_var = (F.linear(x, p.pvera_A[:, : p.site.inp]) * p.pvera_lambda_d).chunk(2, dim=-1)
        z = mu + torch.exp(0.5 * log_var) * self.noise(p, mu)
        return F.linear(z, p.pvera_B[: p.site.out]) * (p.pvera_lambda_b * p.scaling)

    def noise(self, p: View, like: Tensor) -> Tensor:
        """Standard normal numbers, from the layer's own generator where generator_seed is set."""
        if p.cfg.generator_seed is None:
            return torch.randn_like(like)
        generator = p.memory.get("generator")
        if generator is None or generator.device != like.device:
            generator = torch.Generator(device=like.device).manual_seed(p.cfg.generator_seed)
            p.memory["generator"] = generator
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
