"""From a config to adapted layers: targets -> sites -> shared tensors -> tensors and initial values ->
wrap."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import experts, handoff, registry, replication, share, storage, tokens, tying
from .attention import READERS, AttentionSite, projection_config
from .context import Host
from .errors import AdapterError
from .kinds import Attach, Method
from .layer import Adapted
from .parameters import parameter_layers
from .patterns import near_names
from .replace import SavedModule, TokenHolder
from .site import Site, site_of
from .targets import Match, match_targets
from .view import View

if TYPE_CHECKING:
    from .tuner import Tuner


class Target(NamedTuple):
    """A layer to adapt, wrapped, and where the wrapper goes: parent.leaf."""

    name: str
    layer: Adapted
    parent: nn.Module
    leaf: str
    cfg: Any


def candidates(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module a pattern may name. Of an adapted layer only the layer itself, not what is inside it, save
    for an adapted attention's or expert module's own layers."""
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        while isinstance(child, Adapted) and child.site.substitutes:
            child, path = child.base_layer, f"{path}.base_layer"
        if not getattr(child, "is_adapter_wrapper", False):
            yield from candidates(child, path)


def _site(module: nn.Module, name: str, method: Method) -> Site | None:
    if isinstance(module, Adapted):
        return module.site if module.site.kind in method.sites else None
    return site_of(module, name, method.sites)


def find(tuner: Tuner, cfg: Any, method: Method) -> list[Match]:
    """The modules a config adapts; raises where a pattern matches nothing or names a layer without a view."""
    own = method.targets(cfg, candidates(tuner.model)) if isinstance(method, Attach) else None
    if own is not None:
        return [Match(n, tuner.model.get_submodule(n), n.rpartition(".")[2]) for n in own]
    found = match_targets(
        tuner.model,
        cfg,
        model_type=tuner.model_type,
        is_adaptable=lambda m: _site(m, "", method) is not None,
        names=candidates(tuner.model),
        kind=method.defaults,
    )
    past = [m for m in found if _is_read_past(tuner.model, m.name)]
    if past and cfg.target_modules not in (None, "all-linear"):
        path, _, leaf = past[0].name.rpartition(".")
        raise ValueError(
            f"Module {leaf!r} is incompatible with Mamba-based models: the kernels of {path} "
            f"({type(tuner.model.get_submodule(path)).__name__}) read its weight and pass an adapter over in silence. "
            f"Take it out of target_modules (matched by {past[0].pattern!r}), in_proj and x_proj can stay"
        )
    return [m for m in found if m not in past]


def _is_read_past(model: nn.Module, name: str) -> bool:
    """Whether a module is one of those whose weights a state space layer's fused kernels read."""
    path, _, leaf = name.rpartition(".")
    return leaf in ("out_proj", "conv1d") and "A_log" in model.get_submodule(path)._parameters


def inject(tuner: Tuner, name: str, cfg: Any, *, meta: bool = False, fill: bool = True) -> list[str]:
    """Add adapter `name` to the tuner's model; returns the names of the adapted layers.

    meta: create tensors without memory, to be replaced by loaded ones. fill: draw initial values (with meta
    and on loading, only where they change the base).
    """
    fill = fill and not meta
    method: Any = registry.method_of(cfg)
    replication.replicate(tuner, cfg)
    method.prepare(cfg, tuner.model, tuner.model_type)
    experts.to_parameters(cfg, tuner.model, tuner.model_type)
    matches = find(tuner, cfg, method)
    targets = list(_targets(tuner, cfg, method, matches))
    if targets:
        placed = method.by_place([t.cfg for t in targets], [t.layer.site for t in targets])
        targets = [t._replace(cfg=c) for t, c in zip(targets, placed, strict=True)]
    for t in targets:
        t.layer.site.check(getattr(t.cfg, method.dropout or "", None) or 0.0)
        method.check(t.cfg, t.layer.site)
        if t.layer.site.quantised and method.changes_base(t.cfg):
            raise AdapterError(
                f"{method.name} on {t.layer.site!r}: these initial values take a part out of the base's weight, and a "
                "quantised weight cannot give it up exactly. Load the base unquantised, or use "
                "init_lora_weights=True; replace_lora_weights_loftq makes up for the quantisation afterwards"
            )
    share.check(cfg, method, [t.layer for t in targets], [t.cfg for t in targets])
    handoff.check(cfg, method)
    shared = _place_shared(tuner, name, cfg, method, [t.layer for t in targets], meta=meta, fill=fill)
    tuner.attached.add(name, cfg, method, fill=fill)
    for t in targets:
        add_one(tuner, name, t, method, meta=meta, fill=fill, shared=shared)
    entry_of = {m.name: share.leaf_name(m.name) if cfg.target_modules == "all-linear" else m.pattern for m in matches}
    share.tie_own(name, method, cfg, [(entry_of.get(t.name, t.name), t.layer) for t in targets])
    share.tie(tuner, name, [(t.name, t.layer) for t in targets], fresh=fill)
    if fill:
        handoff.inherit(tuner, name)
    if getattr(cfg, "ensure_weight_tying", False) and not getattr(cfg, "modules_to_save", None):
        tying.tie_factors(tuner.model, name, [t.layer for t in targets])
    tokens.tie_targets(tuner, name, method, targets)
    tokens.inject_option(tuner, name, cfg, meta=meta, fill=fill)
    return [m.name for m in matches]


def _targets(tuner: Tuner, cfg: Any, method: Method, matches: list[Match]) -> Iterator[Target]:
    """The matched layers, what goes with them (an attention's output projection), and named parameters."""
    made = [_target(tuner, m, method, cfg.for_layer(m.name)) for m in matches]
    names = {t.layer.site.name: t for t in made}
    saved = getattr(cfg, "modules_to_save", None)
    for path, others in ({} if saved else tying.tied_with(tuner.model, list(names), cfg)).items():
        new = [Match(p, tuner.model.get_submodule(p), path) for p in others if p not in names]
        made += [_target(tuner, m, method, names[path].cfg) for m in new]
        names |= {t.layer.site.name: t for t in made}
    attentions = [t for t in made if isinstance(t.layer.site, AttentionSite)]
    projections = {id(base_of(t.layer.site.module.out_proj)) for t in attentions}
    yield from (t for t in made if id(t.layer.site.module) not in projections)
    for t in attentions:
        attention = t.layer.site.module
        out = Match(f"{t.name}.out_proj", attention.out_proj, "out_proj")  # type: ignore[arg-type]
        yield Target(out.name, _wrap(tuner, out, method), attention, "out_proj", projection_config(t.cfg))
    for name, layer, parent, leaf in parameter_layers(tuner, cfg, method, {id(t.layer.site.module) for t in made}):
        yield Target(name, layer, parent, leaf, cfg.for_layer(name))


def _target(tuner: Tuner, match: Match, method: Method, cfg: Any) -> Target:
    path, _, leaf = match.name.rpartition(".")
    parent = tuner.model.get_submodule(path) if path else tuner.model
    return Target(match.name, _wrap(tuner, match, method), parent, leaf, cfg)


def base_of(module: Any) -> Any:
    """The module itself, without adapters."""
    return module.get_base_layer() if isinstance(module, Adapted) else module


def add_one(
    tuner: Tuner, name: str, t: Target, method: Method, *, meta: bool, fill: bool,
    shared: tuple[nn.Module, dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Give one layer its tensors and initial values, and put the wrapper in place."""
    layer = t.layer
    refills = fill or method.changes_base(t.cfg)
    where: Any = torch.device("meta") if meta and not refills else None
    view = layer.add(name, t.cfg, method, device=where, dtype=tuner.adapter_dtype(layer.site), shared=shared)
    if refills and not layer.site.stored.is_meta:
        fill_in(method, view, t.cfg, layer)
    _settle(t)


def fill_in(method: Method, view: View, cfg: Any, layer: Adapted) -> None:
    """A fresh adapter's initial values on one layer; some change the base's weight."""
    new = method.init(view, cfg, lambda: layer.site.weight().detach())
    if new is not None:
        if layer.merged_adapters:
            raise AdapterError(
                f"{method.name} on {layer.site!r} changes the base's weight, and adapters are merged into "
                "it; "
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


def _settle(t: Target) -> None:
    """Put a new wrapper in the module's place."""
    now = t.parent._modules.get(t.leaf)
    while isinstance(now, TokenHolder | Adapted):  # parameters of one module wrap it one around the other
        if now is t.layer:
            return
        now = now.token_adapter if isinstance(now, TokenHolder) else now.base_layer
    t.layer.site.read_directly = isinstance(t.parent, READERS)
    t.parent._modules[t.leaf] = t.layer


def _place_shared(
    tuner: Tuner, name: str, cfg: Any, method: Method, layers: list[Adapted], *, meta: bool = False, fill: bool = True
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
        made: Any = spec.value
        if callable(made):  # costly: not worked out where a file brings it
            made = made() if fill or not spec.save else torch.empty(spec.shape, dtype=spec.dtype)
            specs[key] = dataclasses.replace(spec, value=None)
        value = made if made.device == device or device.type == "meta" else made.to(device)  # drawn ones stay
        if spec.train:
            value = value.to(device="meta" if meta else device, dtype=tuner.adapter_dtype(site), copy=True)
        elif isinstance(held := tuner._modules.get(key), storage.BufferDict):
            value = held.twin(value)  # adapters of one seed hold its projections once
        storage.place(tuner, key, name, spec, value, site)
    tuner.shared_specs[name] = specs
    return tuner, specs


def save_whole(model: nn.Module, host: Host, name: str, cfg: Any, *, meta: bool = False) -> None:
    """Wrap the modules named in modules_to_save (by their path's end) and give them a copy for this
    adapter."""
    wanted = getattr(cfg, "modules_to_save", None)
    if not wanted:
        return
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    found: set[str] = set()
    hits = {}
    for path, module in candidates(model):
        matched = [w for w in wanted if path.endswith(w)]
        if matched:
            found.update(matched)
            hits[path] = module
    tied = tying.tied_with(model, list(hits), cfg)
    hits |= {p: model.get_submodule(p) for others in tied.values() for p in others}
    for path, module in hits.items():
        if isinstance(module, Adapted):
            raise AdapterError(f"{path} is both a target and in modules_to_save; take it out of one of them")
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise TypeError(
                f"modules_to_save cannot be applied to modules of type {type(module).__name__} ({path}): it is a "
                "container, not called itself; name the modules in it"
            )
        if not isinstance(module, SavedModule):
            wrapper = SavedModule(module, path, host)
            parent_path, _, leaf = path.rpartition(".")
            parent = model.get_submodule(parent_path) if parent_path else model
            setattr(parent, leaf, wrapper)
            module = wrapper
        module.add(name, meta=meta)
    for path, others in tied.items():
        first: Any = model.get_submodule(path)
        for other in others:  # one weight, trained once
            copied: Any = model.get_submodule(other)
            copied.modules_to_save[name].weight = first.modules_to_save[name].weight
    missing = [w for w in wanted if w not in found]
    if missing and not getattr(cfg, "allow_unmatched", False):
        near = near_names(missing[0], [p for p, _ in candidates(model)])
        raise AdapterError(f"modules_to_save: {missing} not found in {type(model).__name__}{near}")
