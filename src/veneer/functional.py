"""Operations on adapters as functions, for a PeftModel or a model that inject_adapter_in_model changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .state import tuner_of
from .tuner import Tuner


def _tuner(model: Any) -> Tuner:
    from .model import PeftModel

    return model.base_model if isinstance(model, PeftModel) and model.prompt_configs is None else tuner_of(model)


def set_adapter(
    model: Any, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make adapters active and, unless inference_mode, trainable. Raises ValueError for an unknown name."""
    _tuner(model).set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(model: Any, adapter_name: str, prefix: str | None = None, layer_cls: Any = None) -> list[str] | None:
    """Remove an adapter; returns the names that are active then, None where none is. prefix, layer_cls: accepted for
    compatibility, the adapter's own method says what goes."""
    tuner = _tuner(model)
    tuner.delete_adapter(adapter_name)
    return tuner.active_adapters or None


def set_requires_grad(model: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train, or not, whether they are active or not."""
    _tuner(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: Any, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """An adapter's half precision tensors to float32; nothing where autocast_adapter_dtype is off."""
    if not autocast_adapter_dtype:
        return
    for _, _, spec, holder, leaf in _tuner(model).tensor_names(adapter_name):
        tensor = getattr(holder, leaf)
        if spec.train and tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.to(torch.float32)
