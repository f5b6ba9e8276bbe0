"""Functions that peft has beside its classes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from . import registry, state
from .config import PeftConfig, PeftType
from .hub import renamed
from .status import layer_status, model_status

get_layer_status = layer_status
get_model_status = model_status

# peft_type -> config class; reading it imports every method
PEFT_TYPE_TO_CONFIG_MAPPING: dict[Any, type[PeftConfig]] = {
    PeftType[n]: registry.config_class(n) for n in registry.types()
}


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict with a peft_type describes. Raises AdapterError for an unknown type."""
    return PeftConfig.from_peft_type(**config_dict)


def load_peft_weights(
    model_id: str | os.PathLike, device: str | None = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """An adapter's tensors from a folder or the hub, under their file keys, on `device` (None: the CPU)."""
    tensors, _ = state.read(model_id, device=device or "cpu", **hub)
    return renamed(tensors, key_mapping)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in half precision `dtype`, trained ones in float32: what mixed precision training expects."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
