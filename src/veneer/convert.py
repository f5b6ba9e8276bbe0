"""An adapter whose initial values changed the base (PiSSA, OLoRA), rewritten against the base as it was."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import AdapterError

if TYPE_CHECKING:
    from .model import PeftModel


def against_initial(
    model: PeftModel, adapter: str, initial: str, tensors: dict[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """Tensors and config of an ordinary LoRA for the original base: W0 - s B0 A0 + s B A = W0 + s [B -B0] [A; A0].

    initial: folder of the adapter as saved before training. Ranks double, and so do alphas (times sqrt 2 under
    rsLoRA), patterns included, so that every layer's scaling stays.
    """
    if str(config.init_lora_weights).lower().partition("_")[0] not in ("pissa", "olora"):
        raise ValueError(
            "`path_initial_model_for_weight_conversion` only works for `init_lora_weights` that change the base's "
            f"weights (pissa, olora), not {config.init_lora_weights!r}"
        )
    if not os.path.isdir(initial) and os.path.isdir(os.path.join(os.path.dirname(initial), adapter)):
        raise AdapterError(f"{initial}: no such folder")
    from .state import read

    before, _ = read(initial)
    out = dict(tensors)
    for key, now in tensors.items():
        if ".lora_A." in key or ".lora_B." in key:
            if key not in before:
                raise AdapterError(f"{initial} has no {key}: it is not this adapter's initial state")
            old = before[key].to(now)
            out[key] = torch.cat([now, old], dim=0) if ".lora_A." in key else torch.cat([now, -old], dim=1)
    config = _doubled(config)
    config.init_lora_weights = True
    return out, config


def _doubled(config: Any) -> Any:
    """A copy with twice the rank and the same scaling, on every layer."""
    config = copy.copy(config)
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * factor
    config.rank_pattern = {k: 2 * r for k, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {k: factor * a for k, a in (config.alpha_pattern or {}).items()}
    return config


# -- a base that data changed ----------------------------------------------------------------------------------
def self_contained(
    model: PeftModel, adapter: str, tensors: dict[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """Tensors and config as they are, or, where data took the first factors out of the base (CorDA, LoRA-GA), those of
    an ordinary LoRA for the original base: what changed the base cannot be found again without the data."""
    starts = _starts(model.base_model, adapter) if model.prompt_configs is None else {}
    if not starts:
        return tensors, config
    out = dict(tensors)
    for key, first in starts.items():
        now = out[key]
        first = first.to(now)
        out[key] = torch.cat([now, first], dim=0) if ".lora_A." in key else torch.cat([now, -first], dim=1)
    config = _doubled(config)
    config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
    return out, config


def own_part(tuner: Any, adapter: str, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The reverse of self_contained for a live adapter: from a file that it wrote, the trained half."""
    out = dict(tensors)
    for key, first in _starts(tuner, adapter, prefix).items():
        held = tensors.get(key)
        axis = 0 if ".lora_A." in key else 1
        if held is None or held.shape[axis] != 2 * first.shape[axis]:
            continue
        now, then = held.chunk(2, dim=axis)
        if torch.allclose(then.to(first), first if axis == 0 else -first):
            out[key] = now
    return out


def _starts(tuner: Any, adapter: str, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path, layer in tuner.adapted_layers():
        entry = layer.entries.get(adapter)
        if entry is not None and entry.start is not None:
            A, B = entry.start
            out |= {f"{prefix}{path}.lora_A.weight": A, f"{prefix}{path}.lora_B.weight": B}
    return out
