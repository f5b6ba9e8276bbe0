"""Where aLoRA adapters begin, counted from each row's end, for code that works it out before it calls the model. A
model finds them by itself when it gets token ids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..methods.alora import NEVER, starts


def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: str, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """For each row of input_ids (rows, length) how many of its tokens the adapter acts on; None where it is not
    invoked, or is no aLoRA. adapter_names: one a row, where rows have adapters of their own."""
    names = [active_adapter] * len(input_ids) if adapter_names is None else adapter_names
    tokens = [getattr(peft_config.get(name), "alora_invocation_tokens", None) for name in names]
    begin = [int(starts(row[None], t)) if t else NEVER for row, t in zip(input_ids, tokens, strict=True)]
    return [None if first == NEVER else input_ids.shape[1] - first for first in begin]


def _added(model: Any, kwargs: dict[str, Any], input_ids: Tensor | None, why: str) -> dict[str, Any]:
    if kwargs.get("alora_offsets") is not None:
        return kwargs
    configs, active = model.peft_config, model.active_adapters
    if not any(getattr(c, "alora_invocation_tokens", None) for c in configs.values()):
        return kwargs
    if input_ids is None:
        warnings.warn(why, stacklevel=3)
        return {**kwargs, "alora_offsets": None}
    names = kwargs.get("adapter_names")
    return {**kwargs, "alora_offsets": calculate_alora_offsets(configs, active[0], input_ids, names)}


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """kwargs with `alora_offsets`, where the model has an aLoRA adapter; None, with a warning, without token ids."""
    why = "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward pass."
    return _added(model, kwargs, input_ids, why)


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The same for the arguments of a generate call."""
    why = "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA."
    return _added(model, kwargs, kwargs.get("input_ids", args[0] if args else None), why)
