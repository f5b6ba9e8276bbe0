"""An adapter whose initial values changed the base (PiSSA, OLoRA), rewritten against the base as it was."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import state
from .errors import AdapterError

if TYPE_CHECKING:
    from .model import PeftModel


def against_initial(
    model: PeftModel, adapter: str, initial: str, tensors: dict[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """Tensors and config of an ordinary LoRA for the original base: W0 - s B0 A0 + s B A = W0 + s [B -B0] [A; A0].

    initial: folder of the adapter as saved before training. The rank doubles, and so does lora_alpha (times sqrt 2
    under rsLoRA), so that the scaling stays.
    """
    if getattr(config, "rank_pattern", None) or getattr(config, "alpha_pattern", None):
        raise AdapterError(
            "path_initial_model_for_weight_conversion does not work with rank_pattern or alpha_pattern yet"
        )
    if str(config.init_lora_weights).lower().partition("_")[0] not in ("pissa", "olora"):
        raise ValueError(
            "`path_initial_model_for_weight_conversion` only works for `init_lora_weights` that change the base's "
            f"weights (pissa, olora), not {config.init_lora_weights!r}"
        )
    if not os.path.isdir(initial) and os.path.isdir(os.path.join(os.path.dirname(initial), adapter)):
        raise AdapterError(f"{initial}: no such folder")
    before, _ = state.read(initial)
    out = dict(tensors)
    for key, now in tensors.items():
        if ".lora_A." in key or ".lora_B." in key:
            if key not in before:
                raise AdapterError(f"{initial} has no {key}: it is not this adapter's initial state")
            old = before[key].to(now)
            out[key] = torch.cat([now, old], dim=0) if ".lora_A." in key else torch.cat([now, -old], dim=1)
    config = copy.copy(config)
    config.r = 2 * config.r
    config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    config.init_lora_weights = True
    return out, config
