"""Settings of LoRA's data-driven initial values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

from ..errors import AdapterError


@dataclass
class EvaConfig:
    """rho: how many times r components a layer may get. tau: a component has converged where two successive estimates
    have at least this cosine. use_label_mask, label_mask_value: leave out tokens with this label. whiten: divide each
    component by the root of its singular value. adjust_scaling_factors: keep alpha / r where a layer's rank changes."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho}")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must be between 0.0 and 1.0, got {self.tau}")


@dataclass
class CordaConfig:
    """corda_method: "ipm" (previews the new task with the leading directions) or "kpm" (keeps knowledge, trains the
    least ones). covariance_file, cache_file: where the inputs' covariances and the finished directions are kept, read
    where they exist. verbose: say what is read and written. use_float16_for_covariance: half the memory, with
    rounding. prune_temporary_fields: forget the covariances once the directions are found."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _one_of(self, "corda_method", ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """direction: which singular vectors of the gradient A and B take. scale: how long the factors are. stable_gamma:
    divides the "stable" scale (its root does)."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        _one_of(self, "direction", ("ArBr", "A2rBr", "ArB2r", "random"))
        _one_of(self, "scale", ("stable", "weight_svd", "gd_scale", "unit"))
        if self.stable_gamma <= 0:
            raise ValueError(f"stable_gamma={self.stable_gamma}: must be above 0")


@dataclass
class LoftQConfig:
    """loftq_bits: 4 (NF4, blocks of 64) or 8 (int8, a scale a row). loftq_iter: alternating steps."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ValueError(f"loftq_bits={self.loftq_bits}: only 4 (nf4) and 8 (int8) are supported")
        if self.loftq_iter < 1:
            raise ValueError(f"loftq_iter={self.loftq_iter}: must be at least 1")


def _one_of(cfg: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(cfg, name)
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name}={value!r}{hint}: one of {', '.join(map(repr, choices))}")


# config field -> (its class, the init_lora_weights it belongs to, whether a default is made)
FIELDS: dict[str, tuple[type, str, bool]] = {
    "eva_config": (EvaConfig, "eva", True),
    "corda_config": (CordaConfig, "corda", True),
    "lora_ga_config": (LoraGAConfig, "lora_ga", True),
    "loftq_config": (LoftQConfig, "loftq", False),
}


def settle(cfg: Any) -> None:
    """Turn a LoraConfig's mappings into settings, and make the default ones that its init_lora_weights needs."""
    import warnings

    init = str(cfg.init_lora_weights).lower()
    for name, (kind, owner, made) in FIELDS.items():
        value = getattr(cfg, name)
        if isinstance(value, Mapping) and value:
            value = _read(kind, name, value)
        if owner == init and not value:
            if not made:
                raise ValueError(f"`{name}` must be specified when `init_lora_weights` is {owner!r}.")
            value = kind()
            if owner == "eva":
                warnings.warn(
                    "`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config.",
                    stacklevel=4,
                )
        elif value and owner != init:
            warnings.warn(
                f"`{name}` specified but will be ignored when `init_lora_weights` is not {owner!r}.", stacklevel=4
            )
            value = {} if name == "loftq_config" else value
        if name == "loftq_config" and isinstance(value, kind):
            value = asdict(value)  # type: ignore[call-overload]  # the form in which files hold it
        setattr(cfg, name, value)


def _read(kind: type, name: str, value: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)]
    for key in value:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise AdapterError(f"{name} has no field {key!r}{hint}; its fields are {', '.join(known)}")
    return kind(**value)
