"""What peft.helpers offers: scaling for a while, caching for DoRA, MonteCLoRA's loss under one's own Trainer, targets
by condition number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from . import registry
from .config import CONFIG_NAME
from .kappa import KappaTuneSelector, find_kappa_target_modules
from .layer import Adapted
from .methods.dora import DoraCaching
from .model import PeftModel

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every adapter of a model inside the block; afterwards it is what it was, to the bit.

    Raises TypeError for a multiplier that is no number, ValueError where the model has no adapters on layers or where
    they are merged.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, float | int):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, Adapted) and m.entries]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s; this one has no adapters on layers")
    if any(m.merged for m in layers):
        raise ValueError("the adapters are merged, so a scaling has no effect; call unmerge_adapter() first")
    before = [dict(m.scaling) for m in layers]
    try:
        for m in layers:
            m.scaling = {name: scale * multiplier for name, scale in m.scaling.items()}
        yield
    finally:
        for m, old in zip(layers, before, strict=True):
            m.scaling = old


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """For code that runs adapters' layers in a dtype of its own (diffusers' layerwise casting). An adapted layer never
    casts its input, it casts its small tensors to the input's dtype, so there is nothing to switch off."""
    yield


def check_if_peft_model(model_name_or_path: str | os.PathLike, **hub: Any) -> bool:
    """Whether a folder or hub repository holds an adapter with a config that can be read. A path that does not exist is
    none; a hub that cannot be reached is an error."""
    from .files import locate

    try:
        path = locate(model_name_or_path, CONFIG_NAME, **hub)
        found = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:  # neither a folder nor a repository, or no JSON
        return False
    return isinstance(found, dict) and found.get("peft_type") in registry.types()


class MontecloraTrainerMixin:
    """Adds what the adapters' methods put on the loss (MonteCLoRA's divergences, KaSA's penalties) in a Trainer:
    `class MyTrainer(MontecloraTrainerMixin, Trainer)`. veneer's own trainers do so by themselves."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        parent: Any = super()
        result = parent.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        inner = model
        while not isinstance(inner, PeftModel) and getattr(inner, "module", None) is not None:
            inner = inner.module  # a wrapper for several devices
        extra = inner.base_model.extra_loss() if isinstance(inner, PeftModel) and inner.prompt_configs is None else 0.0
        return (result[0] + extra, result[1]) if return_outputs else result + extra
