"""LoRA: low-rank adaptation. Hu et al. 2021, arXiv:2106.09685, section 4.1.

    y = W x + (alpha / r) B A x          rsLoRA (arXiv:2312.03732): alpha / sqrt(r)

    lora_A.weight (r, inp)               lora_embedding_A (r, rows) on an embedding
    lora_B.weight (out, r)               lora_embedding_B (out, r)
    lora_B.bias   (out,)                 with lora_bias
    a parameter that stacks E experts: lora_A (r * E, inp), lora_B (out, r * E)

Convolutions: A (r, inp, *kernel) reads with the layer's own stride and padding, B (out, r / groups, 1, ...) mixes.
Merges; on a convolution with groups > 1 it does not, since A reads every channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from .. import inits
from ..config import AdapterConfig
from ..errors import AdapterError
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View
from . import lora_options
from .lora_options import ArrowConfig, BdLoraConfig, KasaConfig, LoraRuntimeConfig, MontecloraConfig, VeloraConfig

DENSE = frozenset({"linear", "conv", "embedding", "attention"})


@dataclass
class LoraConfig(AdapterConfig):
    """r: rank. lora_alpha: the change is scaled by lora_alpha / r. lora_dropout: on the adapter's input.

    bias: "none", "all" or "lora_only", which of the base's biases are trained. init_lora_weights: True (A random,
    B zero), False (both random, for tests), "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "mica",
    "loftq" (with loftq_config), "eva" (eva_config), "corda" (corda_config), "lora_ga" (lora_ga_config): see
    veneer.inits.
    rank_pattern, alpha_pattern: {layer name or regex: value}. target_parameters: names of 3-D expert weights.
    Variants: use_dora, velora_config, alora_invocation_tokens (token ids after which the adapter acts), use_qalora with
    qalora_group_size, monteclora_config, use_bdlora, kasa_config. layer_replication: [first, end) ranges of the base's
    layers that make a deeper stack over the same weights. megatron_config, megatron_core: kept for files;
    Megatron's own parallel layers are not adapted.
    """

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: inits.LoftQConfig | dict = field(default_factory=dict)
    eva_config: inits.EvaConfig | dict | None = None
    corda_config: inits.CordaConfig | dict | None = None
    lora_ga_config: inits.LoraGAConfig | dict | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | dict | None = None
    arrow_config: ArrowConfig | dict | None = None
    kasa_config: KasaConfig | dict | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LORA"
        inits.settle(self)
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"`target_parameters` must be a list of strings or None. Got the string {self.target_parameters!r}"
            )
        for name in lora_options.PARTS:
            setattr(self, name, lora_options.made(name, getattr(self, name)))
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                f"The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights!r} instead."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of one run."""
        return {k: v for k, v in super().to_dict().items() if k != "runtime_config"}


def lora_tensors(cfg: LoraConfig, site: Site) -> dict[str, Spec]:
    """A and B for any kind of layer."""
    r, k = cfg.r * site.experts, site.kernel
    if site.kind == "embedding":
        return {"lora_embedding_A": Spec((r, site.inp)), "lora_embedding_B": Spec((site.out, r))}
    down, up = ("conv-down", "conv-up") if k else ("linear", "linear")
    out = {
        "lora_A.weight": Spec((r, site.inp, *k), like=down),
        "lora_B.weight": Spec((site.out, r // site.groups, *(1 for _ in k)), like=up),
    }
    if cfg.lora_bias:
        out["lora_B.bias"] = Spec((site.out,))
    return out


def lora_factors(p: View) -> tuple[Tensor, Tensor]:
    if p.site.kind == "embedding":
        return p.lora_embedding_B, p.lora_embedding_A
    return p.lora_B, p.lora_A


def lora_scaling(cfg: LoraConfig) -> float:
    return cfg.lora_alpha / (math.sqrt(cfg.r) if cfg.use_rslora else cfg.r)


# option of the config -> the variant that it selects; at most one of them
VARIANTS = {
    "alora_invocation_tokens": "ALORA",
    "arrow_config": "ARROW",
    "kasa_config": "KASA",
    "monteclora_config": "MONTECLORA",
    "use_bdlora": "BDLORA",
    "use_dora": "DORA",
    "velora_config": "VELORA",
}


def lora_variant(cfg: LoraConfig) -> str | None:
    """The registry name of the variant that a config asks for.

    Raises ValueError for two at once.
    """
    asked = {k: v for k, v in VARIANTS.items() if getattr(cfg, k) not in (None, False)}
    if str(cfg.init_lora_weights).lower() == "mica":
        asked["mica"] = "MICA"
    if len(asked) > 1:
        raise ValueError(
            f"Invalid or unsupported variant combination: {tuple(sorted(asked))}; set one of these options alone"
        )
    return next(iter(asked.values()), "QALORA" if cfg.use_qalora else None)


def lora_bias_delta(p: View) -> Tensor | None:
    return p.lora_B_bias * p.scaling if p.cfg.lora_bias else None


def lora_check(cfg: LoraConfig, site: Site) -> None:
    if cfg.r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {cfg.r} ({site!r})")
    if cfg.r % site.groups:
        raise ValueError(
            f"Targeting a {type(site.module).__name__} with groups={site.groups} and rank {cfg.r}. "
            f"Currently, support is limited to conv layers where the rank is divisible by groups. "
            f"Either choose a different rank or do not target this specific layer. ({site!r})"
        )
    if site.kind == "parameter" and (cfg.lora_bias or cfg.fan_in_fan_out):
        option = "lora_bias" if cfg.lora_bias else "fan_in_fan_out"
        raise ValueError(f"target_parameters does not work with {option}=True ({site!r})")
    if cfg.lora_bias and site.kind == "embedding":
        raise AdapterError(
            f"lora_bias=True is not supported for Embedding, which has no bias; take {site!r} out of target_modules"
        )


class LoraFactors(LowRank):
    """What LoRA and its variants have in common: A and B under LoRA's names, its config, scaling and initial values."""

    Config = LoraConfig
    prefix = "lora_"
    dropout = "lora_dropout"

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return lora_tensors(cfg, site)

    def scaling(self, cfg: Any) -> float:
        return lora_scaling(cfg)

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        return inits.initial(p, cfg, weight)

    def changes_base(self, cfg: Any) -> bool:
        return inits.changes_base(cfg)

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        return lora_factors(p)

    def bias_delta(self, p: View) -> Tensor | None:
        return lora_bias_delta(p)


class LoRA(LoraFactors):
    sites = DENSE | {"parameter"}
    steady = True
    exempt: ClassVar[dict[str, str]] = {
        "forward == merged with groups": "A reads every channel and a grouped kernel does not, so merging is refused",
    }

    def variant(self, cfg: Any) -> str | None:
        return lora_variant(cfg)
