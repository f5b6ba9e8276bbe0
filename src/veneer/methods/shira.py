"""SHiRA: sparse high-rank adapters, few entries of the weight are trained in place. Bhardwaj et al. 2024,
arXiv:2406.13175, section 3.

    W' = W + s M,   M zero but for shira_weight at shira_indices

    shira_weight  (r (out + inp),)      starts at zero
    shira_indices (2, r (out + inp))    rows and columns, int32, frozen and saved

The positions are the seed's, the first of a random permutation in the weight's own order; or those of
`config.mask_fn(base_layer, r)`, set on the config by the user: a function that returns a mask shaped like the
layer's weight with r (out + inp) ones; one with a parameter `random_seed` gets the config's. Merges. Beyond peft:
transformers' Conv1D.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..kinds import Additive, Spec, Weights
from ..site import Site
from ..view import View

Mask = Callable[..., Tensor]


def random_mask(base_layer: torch.nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask with r (out + inp) ones at random places, shaped like the layer's weight. Without a seed, from torch's own
    generator: processes that are seeded alike must get the same places."""
    weight: Any = base_layer.weight
    generator = None if random_seed is None else torch.Generator().manual_seed(random_seed)
    mask = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    chosen = torch.randperm(weight.numel(), generator=generator)[: r * sum(weight.shape)]
    mask[chosen.to(weight.device)] = 1
    return mask.reshape(weight.shape)


def _seed(cfg: ShiraConfig) -> dict[str, int | None]:
    """The seed, for a mask function that takes one."""
    assert cfg.mask_fn is not None
    found = inspect.signature(cfg.mask_fn).parameters
    takes = "random_seed" in found or any(p.kind is p.VAR_KEYWORD for p in found.values())
    return {"random_seed": cfg.random_seed} if takes else {}


@dataclass
class ShiraConfig(AdapterConfig):
    """r: the number of trained entries is r (out + inp), that of a LoRA of this rank. mask_type: "random", or any
    other name with a function of your own in `mask_fn`. random_seed: of the random mask; None: torch's
    own generator goes on.

    init_weights: False draws the entries at random, for tests.
    """

    r: int = 32
    mask_type: Literal["random"] = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SHIRA"
        self.mask_fn: Mask | None = random_mask if self.mask_type == "random" else None


class SHiRA(Additive):
    Config = ShiraConfig
    prefix = "shira_"
    defaults = "shira"
    by_weight = True

    def check(self, cfg: Any, site: Site) -> None:
        if cfg.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
        if cfg.r * (site.out + site.inp) > site.out * site.inp:
            raise ValueError(
                f"The set rank {cfg.r} results in more shira params than the total number of params in the base "
                f"layer {site.out * site.inp} and this is not allowed. ({site!r})"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        n = cfg.r * (site.out + site.inp)
        return {"shira_weight": Spec((n,)), "shira_indices": Spec((2, n), train=False, dtype=torch.int32)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        if cfg.mask_fn is None:
            raise ValueError(
                f"mask_type={cfg.mask_type!r} is not built in; set `config.mask_fn` to a function that returns the mask"
            )
        base: Any = SimpleNamespace(weight=weight()) if p.site.quantised else p.site.module  # not the packed weight
        mask = cfg.mask_fn(base, cfg.r, **_seed(cfg))
        at = p.site.to_canonical(mask).nonzero().T
        if at.shape != p.shira_indices.shape:
            raise ValueError(
                f"the mask for {p.site!r} has {at.shape[1]} ones; r={cfg.r} asks for r * (out + in) = "
                f"{p.shira_indices.shape[1]}"
            )
        p.fill("shira_indices", at)
        w = p.shira_weight
        p.fill("shira_weight", torch.zeros_like(w) if cfg.init_weights else torch.randn_like(w))
        return None

    def scattered(self, p: View, onto: Tensor) -> Tensor:
        rows, columns = p.shira_indices.long()
        flat = onto.reshape(-1).index_add(0, rows * p.site.inp + columns, p.shira_weight * p.scaling)
        return flat.reshape(p.site.out, p.site.inp)

    def delta(self, p: View) -> Tensor:
        return self.scattered(p, p.shira_weight.new_zeros(p.site.out * p.site.inp))

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        for p in ps:
            W = self.scattered(p, W)
        return W, b
