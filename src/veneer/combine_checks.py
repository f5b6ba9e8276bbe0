"""What add_weighted_adapter refuses, and why."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING

from . import registry
from .combine_math import Settings
from .errors import AdapterError
from .kinds import Method

if TYPE_CHECKING:
    from .tuner import Tuner

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("cat", "svd", *ON_FACTORS, *(f"{t}_svd" for t in ON_FACTORS if t != "linear"))
PLAIN = frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"})


def check_settings(s: Settings, names: list[str], weights: list[float]) -> None:
    if s.combination_type not in TYPES:
        near = get_close_matches(str(s.combination_type), TYPES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"Invalid combination_type: {s.combination_type!r}{hint}; one of {', '.join(TYPES)}")
    if not names:
        raise ValueError("add_weighted_adapter needs at least one adapter")
    if len(names) != len(weights):
        raise ValueError(f"{len(names)} adapters and {len(weights)} weights; give one weight for each adapter")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights={weights}: each must be a finite number")
    if s.svd_rank is not None and s.svd_rank < 1:
        raise ValueError(f"svd_rank={s.svd_rank}: must be at least 1")
    if s.svd_error is not None:
        if s.combination_type != "svd" or s.svd_rank is not None:
            raise ValueError(
                "svd_error chooses each layer's rank: it goes with combination_type='svd', without svd_rank"
            )
        if not 0 <= s.svd_error < 1:
            raise ValueError(f"svd_error={s.svd_error}: a share of the sum's norm, at least 0 and below 1")
    if s.svd_clamp is not None and not 0 < s.svd_clamp <= 1:
        raise ValueError(f"svd_clamp={s.svd_clamp}: a quantile, above 0 and at most 1")
    if s.combination_type.removesuffix("_svd") in ON_FACTORS[1:]:
        if s.density is None or not 0 < s.density <= 1:
            raise ValueError(
                f"combination_type={s.combination_type!r} keeps a share of the entries: density must be "
                f"above 0 and at most 1, got {s.density}"
            )
    if s.majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={s.majority_sign_method!r}: 'total' or 'frequency'")


def refuse(tuner: Tuner, name: str) -> None:
    """Raise AdapterError where a weighted sum with this adapter is not a plain LoRA adapter."""
    cfg = tuner.peft_config[name]
    method = registry.method_of(cfg)
    assert isinstance(method, Method)  # a Tuner holds no prompts
    why = ""
    if method.name == "DORA":
        why = "DoRA rescales the whole weight, so its changes do not add up to low-rank factors"
    elif method.name not in ("LORA", "ALORA"):
        why = f"{method.name} is not plain LoRA; only LoRA's factors can be summed into a LoRA adapter"
    elif method.changes_base(cfg):
        why = (
            f"init_lora_weights={cfg.init_lora_weights!r} changed the base's weights, and a file of the sum "
            "could not say so; convert the adapter to plain LoRA when saving it, and load that"
        )
    elif cfg.bias != "none":
        why = f"bias={cfg.bias!r} trained biases of the base itself, which all adapters share"
    elif cfg.trainable_token_indices:
        why = "it trains token rows (trainable_token_indices), which replace the base's and do not add up"
    elif cfg.target_parameters:
        why = "add_weighted_adapter does not support targeting nn.Parameter (its target_parameters)"
    elif cfg.get("ensure_weight_tying"):
        why = "its factors are tied between layers (ensure_weight_tying), and a sum of products need not be"
    else:
        odd = {k for _, m in tuner.adapted_layers() if name in m.entries for k in m.entries[name].specs} - PLAIN
        why = f"it holds {', '.join(sorted(odd))} beside LoRA's A and B" if odd else ""
    if why:
        raise AdapterError(f"adapter {name!r} cannot be part of a weighted sum: {why}")


def check_saved_modules(tuner: Tuner, names: list[str]) -> None:
    for path, wrapper in tuner.saved_modules():
        holders = [n for n in dict.fromkeys(names) if n in wrapper.modules_to_save]
        if len(holders) > 1:
            raise ValueError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save: {path} "
                f"is held by {', '.join(map(repr, holders))}, and there is one place for it"
            )
