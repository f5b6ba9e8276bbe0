"""EVA's findings into an adapter: ranks, patterns and A."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .prepared import pattern_key, tuner_in


def write(model: nn.Module, found: dict[str, Tensor], adapter: str, config: Any) -> None:
    """Give each named layer its A, at its own rank, and let the config say so. The other layers of the adapter lose
    it: their inputs explain too little to get a direction."""
    tuner = tuner_in(model)
    if tuner is None:
        raise AdapterError(f"{type(model).__name__} holds no adapters; call get_peft_model first")
    found = {name.removeprefix("base_model.model."): A for name, A in found.items()}
    layers = {n: x for n, x in tuner.adapted_layers() if adapter in x.entries and x.site.kind == "linear"}
    unknown = sorted(set(found) - set(layers))
    if unknown:
        raise AdapterError(f"eva_state_dict names {unknown[0]}, and adapter {adapter!r} has no such linear layer")
    for name, A in found.items():
        if A.dim() != 2 or A.shape[1] != layers[name].site.inp:
            raise AdapterError(f"{name}: A is {tuple(A.shape)}, the layer reads {layers[name].site.inp} features")
    before = {n: layers[n].entries[adapter].cfg for n in layers}
    ranks = {n: len(found[n]) if n in found else 0 for n in layers}
    _patterns(config, before, ranks)
    for name, layer in layers.items():
        if ranks[name] == 0:
            layer.delete_adapter(adapter)
        else:
            _one(layer, adapter, config, before[name], name, found[name])
    if 0 in ranks.values():  # the file must name the layers that are left
        config.target_modules = {n for n, x in tuner.adapted_layers() if adapter in x.entries}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.layers = None
    tuner.host.version += 1


def _patterns(config: Any, before: dict[str, Any], ranks: dict[str, int]) -> None:
    """rank_pattern and alpha_pattern for ranks that changed; the scaling stays where the settings ask for it."""
    config.rank_pattern, config.alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for name, rank in ranks.items():
        old = before[name]
        if rank in (0, old.r):
            continue
        key = pattern_key(name, ranks)
        config.rank_pattern[key] = rank
        if config.eva_config.adjust_scaling_factors:
            ratio = math.sqrt(rank / old.r) if config.use_rslora else rank / old.r
            config.alpha_pattern[key] = old.lora_alpha * ratio


def _one(layer: Any, adapter: str, config: Any, old: Any, name: str, A: Tensor) -> None:
    entry = layer.entries[adapter]
    device, dtype = (lambda t: (t.device, t.dtype))(layer.view(adapter).lora_A)
    trains = [p.requires_grad for p in layer.parameters_of(adapter)]
    resolved = config.for_layer(name)
    if len(A) != old.r:
        layer.delete_adapter(adapter)
        layer.add(adapter, resolved, entry.method, device=device, dtype=dtype)
        layer.require_grad(adapter, any(trains))
    view = layer.view(adapter)
    view.fill("lora_A", A.to(device=device, dtype=dtype))
    with torch.no_grad():
        view.lora_B.zero_()
