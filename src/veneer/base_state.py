"""The base's own tensors under the names they had before anything was adapted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .parameters import plain_modules


def _base(model: Any) -> nn.Module:
    from .model import PeftModel
    from .tuner import Tuner

    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, Tuner) else model


def _places(model: Any) -> Iterator[tuple[str, Tensor]]:
    base = _base(model)
    for path, module in [("", base), *plain_modules(base, saved=True)]:
        passing = module._non_persistent_buffers_set
        own = [*module._parameters.items(), *((n, b) for n, b in module._buffers.items() if n not in passing)]
        for name, tensor in own:
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """What `state_dict()` of the base gave before it was adapted: the same keys, no adapter tensors.

    model: a PeftModel, or a model that inject_adapter_in_model changed. While adapters are merged the weights are the
    merged ones.
    """
    return {key: tensor.detach() for key, tensor in _places(model)}


def set_base_model_state_dict(model: Any, state_dict: dict[str, Tensor], strict: bool = True) -> _IncompatibleKeys:
    """Copy tensors into the base under the names of `get_base_model_state_dict`; returns missing and unexpected keys.

    Raises RuntimeError, before anything is copied, for a tensor of another shape and, where strict, for missing or
    unexpected keys.
    """
    places = dict(_places(model))
    missing, unexpected = [k for k in places if k not in state_dict], [k for k in state_dict if k not in places]
    wrong = [
        f"size mismatch for {k}: the model has {tuple(t.shape)}, the state dict {tuple(state_dict[k].shape)}"
        for k, t in places.items()
        if k in state_dict and state_dict[k].shape != t.shape
    ]
    if strict:
        wrong += [f"Missing key(s) in state_dict: {', '.join(missing)}"] * bool(missing)
        wrong += [f"Unexpected key(s) in state_dict: {', '.join(unexpected)}"] * bool(unexpected)
    if wrong:
        raise RuntimeError(f"cannot load into the base {type(_base(model)).__name__}:\n" + "\n".join(wrong))
    with torch.no_grad():
        for key, tensor in places.items():
            if key in state_dict:
                tensor.copy_(state_dict[key])
    return _IncompatibleKeys(missing, unexpected)
