"""The settings of LoRA's variants, as parts of LoraConfig: each may be given as its class or as a dict, and is a dict
in adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, kept out of files. ephemeral_gpu_offload: accepted and without effect; initial values are
    computed where the base's weight lies."""

    ephemeral_gpu_offload: bool = False


@dataclass
class BdLoraConfig:
    """target_modules_bd_a, target_modules_bd_b: parts of layer names whose A, or B, is block-diagonal. nblocks: how
    many blocks. match_strict: a target that neither list names is an error, else it gets plain LoRA."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        a, b = self.target_modules_bd_a or [], self.target_modules_bd_b or []
        if set(a) & set(b):
            raise ValueError(f"Found overlapping modules in target_modules_bd lists:{a} (A) and {b} (B).")


@dataclass
class KasaConfig:
    """beta: weight of the singular values' squares in the loss. gamma: of the distance from orthogonal factors."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


@dataclass
class VeloraConfig:
    """num_groups: sub-tokens in a token, each stored as one number. scale: of what backward rebuilds. init_type: where
    the direction comes from: the mean of each batch, of the first batch, or random."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average_once", "batch_average", "random"] = "batch_average"

    def __post_init__(self) -> None:
        for name in ("num_groups", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be positive, got {getattr(self, name)}.")
        if self.init_type not in ("batch_average_once", "batch_average", "random"):
            raise ValueError(
                f"Unsupported `init_type` {self.init_type!r}. Supported values are 'batch_average_once', "
                "'batch_average', and 'random'."
            )


@dataclass
class MontecloraConfig:
    """num_samples: Gaussians in the mixture. sample_scaler: size of the noise. kl_loss_weight: of the divergences in
    the loss. dirichlet_prior: concentration of the weights' prior. use_entropy: whether the loss holds the sum of the
    weights' squares. buffer_size: kept for files; noise is drawn when it is needed."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be greater than 0.")


@dataclass
class ArrowConfig:
    """top_k: adapters a token is routed to. router_temperature: of the softmax over them. use_gks: take the mean of
    the general adapters out of each. task_adapter_names, gks_adapter_names: those adapters, on the same model.
    rng_seed: kept for files; the directions are computed exactly, so nothing is drawn."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ValueError(f"top_k cannot be negative. It must be at least 1, got {self.top_k}.")
        if self.router_temperature <= 0:
            raise ValueError(f"router_temperature must be greater than 0. Got {self.router_temperature}.")


PARTS: dict[str, type] = {
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "runtime_config": LoraRuntimeConfig,
}


def made(name: str, value: Any) -> Any:
    """A part's value as its class, from a dict where it came from a file.

    Raises TypeError for anything else; ValueError for a key that the part does not have.
    """
    part = PARTS[name]
    if value is None or isinstance(value, part):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be a `{part.__name__}`, a dict, or None; got {value!r}.")
    unknown = sorted(set(value) - set(part.__dataclass_fields__))  # type: ignore[attr-defined]
    if unknown:
        known = ", ".join(part.__dataclass_fields__)  # type: ignore[attr-defined]
        raise ValueError(f"{name} has no {', '.join(map(repr, unknown))}; it has {known}")
    return part(**value)
