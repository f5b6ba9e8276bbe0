"""From a config to adapted layers: targets -> sites -> shared tensors -> per-layer tensors and initial values -> wrap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import registry, storage
from .context import Host
from .errors import AdapterError
from .kinds import Method
from .layer import Adapted, View
from .patterns import near_names
from .replace import SavedModule
from .site import Site, site_of
from .targets import Match, match_targets

if TYPE_CHECKING:
    from .tuner import Tuner


def candidates(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module a pattern may name. Of an adapted layer only the layer itself, not what is inside it."""
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        if not getattr(child, "is_adapter_wrapper", False):
            yield from candidates(child, path)


def _site(module: nn.Module, name: str, method: Method) -> Site | None:
    if isinstance(module, Adapted):
        return module.site if module.site.kind in method.sites else None
    return site_of(module, name, method.sites)


def find(tuner: Tuner, cfg: Any, method: Method) -> list[Match]:
    """The modules a config adapts; raises where a pattern matches nothing or names a layer without a view."""
    return match_targets(
        tuner.model,
        cfg,
        model_type=tuner.model_type,
        is_adaptable=lambda m: _site(m, "", method) is not None,
        names=candidates(tuner.model),
        kind=method.defaults,
    )


def inject(tuner: Tuner, name: str, cfg: Any, *, meta: bool = False, fill: bool = True) -> list[str]:
    """Add adapter `name` to the tuner's model; returns the names of the adapted layers.

    meta: create tensors without memory, to be replaced by loaded ones. fill: draw initial values (on loading, only
    where they change the base).
    """
    method = registry.method_of(cfg)
    method.prepare(cfg, tuner.model, tuner.model_type)
    matches = find(tuner, cfg, method)
    layers = [_wrap(tuner, m, method) for m in matches]
    configs = [cfg.for_layer(m.name) for m in matches]
    for layer, layer_cfg in zip(layers, configs, strict=True):
        method.check(layer_cfg, layer.site)
    shared = _place_shared(tuner, name, cfg, method, layers)
    for match, layer, layer_cfg in zip(matches, layers, configs, strict=True):
        refills = fill or method.changes_base(layer_cfg)
        where: Any = torch.device("meta") if meta and not refills else None
        view = layer.add(name, layer_cfg, method, device=where, dtype=tuner.adapter_dtype(layer.site), shared=shared)
        if refills and not layer.site.stored.is_meta:
            _init(method, view, layer_cfg, layer)
        _settle(tuner, match, layer)
    return [m.name for m in matches]


def _init(method: Method, view: View, cfg: Any, layer: Adapted) -> None:
    new = method.init(view, cfg, lambda: layer.site.weight().detach())
    if new is not None:
        if layer.merged_adapters:
            raise AdapterError(
                f"{method.name} on {layer.site!r} changes the base's weight, and adapters are merged into it; "
                "unmerge them first"
            )
        site = layer.site
        site.stored.data = site.from_canonical(new).to(site.dtype).contiguous()


def _wrap(tuner: Tuner, match: Match, method: Method) -> Adapted:
    if isinstance(match.module, Adapted):
        return match.module
    site = _site(match.module, match.name, method)
    assert site is not None  # match_targets asked the same question
    return Adapted(site, tuner.host)


def _settle(tuner: Tuner, match: Match, layer: Adapted) -> None:
    """Put a new wrapper in the module's place."""
    if match.module is layer:
        return
    path, _, leaf = match.name.rpartition(".")
    parent = tuner.model.get_submodule(path) if path else tuner.model
    setattr(parent, leaf, layer)
    if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        parent._modules[leaf] = layer


def _place_shared(
    tuner: Tuner, name: str, cfg: Any, method: Method, layers: list[Adapted]
) -> tuple[nn.Module, dict[str, Any]] | None:
    """Create the adapter's shared tensors on the tuner, once."""
    specs = method.shared(cfg, [layer.site for layer in layers])
    if not specs:
        return None
    site = layers[0].site
    device = next((p.device for p in tuner.model.parameters()), torch.device("cpu"))
    for key, spec in specs.items():
        if spec.value is None:
            raise AdapterError(f"{method.name}: shared tensor {key!r} was declared without a value")
        value = spec.value.to(device) if spec.value.device != device else spec.value
        storage.place(tuner, key, name, spec, value, site)
    tuner.shared[name] = specs
    return tuner, specs




def save_whole(model: nn.Module, host: Host, name: str, cfg: Any, *, meta: bool = False) -> None:
    """Wrap the modules named in modules_to_save (by the end of their path) and give them a copy for this adapter."""
    wanted = getattr(cfg, "modules_to_save", None)
    if not wanted:
        return
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    found: set[str] = set()
    for path, module in list(candidates(model)):
        hit = next((w for w in wanted if path.endswith(w)), None)
        if hit is None:
            continue
        found.add(hit)
        if isinstance(module, Adapted):
            raise AdapterError(f"{path} is both a target and in modules_to_save; take it out of one of them")
        if not isinstance(module, SavedModule):
            wrapper = SavedModule(module, path, host)
            parent_path, _, leaf = path.rpartition(".")
            parent = model.get_submodule(parent_path) if parent_path else model
            setattr(parent, leaf, wrapper)
            module = wrapper
        module.add(name, meta=meta)
    missing = [w for w in wanted if w not in found]
    if missing and not getattr(cfg, "allow_unmatched", False):
        near = near_names(missing[0], [p for p, _ in candidates(model)])
        raise AdapterError(f"modules_to_save: {missing} not found in {type(model).__name__}{near}")
