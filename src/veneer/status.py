"""What is adapted, active, merged and trainable, read off a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .layer import Adapted
from .replace import SavedModule

Flag = bool | Literal["irregular"]


@dataclass
class LayerStatus:
    """One adapted layer. requires_grad and devices: per adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class ModelStatus:
    """The whole model; "irregular" where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Flag
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


def _agree(values: Iterable[Any], default: Any = False) -> Any:
    seen = list(values)
    if not seen:
        return default
    return seen[0] if all(v == seen[0] for v in seen) else "irregular"


def _tensors(layer: Adapted, adapter: str) -> list[torch.Tensor]:
    return [getattr(h, leaf) for h, leaf in layer.entries[adapter].where.values()]


def _root(model: Any, asked: str) -> nn.Module:
    """What layers are named from: the Tuner of a PeftModel, so that names begin with "model.", or the model."""
    from .tuner import Tuner

    base = getattr(model, "base_model", model)
    if isinstance(base, Tuner):
        return base
    if not any(isinstance(m, Adapted) for m in model.modules()):
        from .model import PeftModel

        if isinstance(model, PeftModel):
            raise TypeError(
                f"{asked}() got an invalid PeftModel instance: {model.peft_type} adds to the input and has no adapter "
                "layers"
            )
        raise ValueError(
            f"No adapter layers found in the model ({type(model).__name__}); status is for models with adapters on "
            "their layers"
        )
    return model


def layer_status(model: Any) -> list[LayerStatus]:
    """One LayerStatus for each adapted layer and each module trained whole. Raises ValueError for a model without,
    TypeError for one whose adapters are prompts."""
    return _layers(_root(model, "get_layer_status"))


def _layers(root: nn.Module) -> list[LayerStatus]:
    out = []
    for name, layer in root.named_modules():
        if isinstance(layer, Adapted):
            out.append(_layer(name, layer))
        elif isinstance(layer, SavedModule):
            out.append(_saved(name, layer))
    if not out:
        raise TypeError("No adapter layers found in the model, please ensure that it's a PEFT model.")
    return out


def _layer(name: str, layer: Adapted) -> LayerStatus:
    kinds = sorted({e.method.name.lower() for e in layer.entries.values()})
    base = "ParamWrapper" if layer.site.kind == "parameter" else type(layer.base_layer).__name__
    return LayerStatus(
        name=name,
        module_type="TrainableTokensLayer" if kinds == ["trainable_tokens"] else f"{'+'.join(kinds)}.{base}",
        enabled=layer.enabled,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_adapters),
        requires_grad={n: _agree(p.requires_grad for p in layer.parameters_of(n)) for n in sorted(layer.entries)},
        available_adapters=sorted(layer.entries),
        devices={n: sorted({t.device.type for t in _tensors(layer, n)}) for n in layer.entries},
        quantization_backend=getattr(layer.site, "library", None),
    )


def _saved(name: str, module: SavedModule) -> LayerStatus:
    copies = {n: list(copied.parameters()) for n, copied in sorted(module.modules_to_save.items())}
    return LayerStatus(
        name=name,
        module_type="ModulesToSaveWrapper",
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=[],
        requires_grad={n: _agree(p.requires_grad for p in ps) for n, ps in copies.items()},
        available_adapters=list(copies),
        devices={n: sorted({p.device.type for p in ps}) for n, ps in copies.items()},
    )


def _merged(layers: list[LayerStatus]) -> list[str] | Literal["irregular"]:
    """The adapters that are merged on every layer that has them; "irregular" where one is on some of its layers."""
    able = [s for s in layers if s.module_type != "ModulesToSaveWrapper"]
    merged = {n for s in able for n in s.merged_adapters}
    if any(n in merged and n not in s.merged_adapters for s in able for n in s.available_adapters):
        return "irregular"
    return sorted(merged)


def _active(layers: list[LayerStatus]) -> list[str] | Literal["irregular"]:
    """Active adapters; a module trained whole counts only where it has a copy for one of them."""
    return _agree(
        (s.active_adapters for s in layers if s.module_type != "ModulesToSaveWrapper" or s.active_adapters), []
    )


def _model_type(configs: Any) -> str:
    first = next(iter(configs.values()), None)
    return "None" if first is None else f"{type(first).__name__.removesuffix('Config')}Model"


def model_status(model: Any) -> ModelStatus:
    """The layers' status put together."""
    root: Any = _root(model, "get_model_status")
    layers = _layers(root)
    configs = getattr(model, "peft_config", {})
    tuned = root is not model
    inner = root.model if tuned else root
    names = sorted({a for s in layers for a in s.available_adapters})
    params = list(model.parameters())
    return ModelStatus(
        base_model_type=type(inner).__name__,
        adapter_model_type=_model_type(configs) if tuned else "None",
        peft_types={n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in configs.items()},
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        total_params=sum(p.numel() for p in params),
        num_adapter_layers=len(layers),
        enabled=_agree(s.enabled for s in layers),
        active_adapters=_active(layers),
        merged_adapters=_merged(layers),
        requires_grad={n: _agree(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, [])}) for n in names},
    )
