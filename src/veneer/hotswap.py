"""Hot swap: another adapter's tensors into the place of one that is loaded, without new modules and, where the sizes
are equal, without new tensors, so that a compiled model stays compiled.

Works for every method. A layer that the new file leaves out stands still: its tensors become zero where that is the
method's identity. Nothing is changed before all of the file is known to fit.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import prompts, registry, state
from .config import PeftConfig
from .errors import AdapterError, PeftWarning
from .hotswap_room import fit_config, padded
from .identity import is_identity
from .kinds import Spec
from .layer import Adapted
from .storage import BufferDict
from .view import attribute

# settings that say where an adapter sits or how it began
_FREE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers", "inference_mode",
         "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "allow_unmatched", "r",
         "lora_alpha", "alpha", "rank_pattern", "alpha_pattern"}  # fmt: skip
_START = {"init_lora_weights", "init_weights", "modules_to_save"}
_SAME = ("use_rslora", "use_dora", "lora_bias", "modules_to_save", "bias", "num_virtual_tokens")


class _Write(NamedTuple):
    """One tensor of the new adapter and its place."""

    holder: Any
    leaf: str
    value: Tensor


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the adapter `adapter_name` of a model by a saved one of the same method.

    Raises ValueError for another method or settings that cannot be swapped, RuntimeError for tensors without a place.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    tensors, _ = state.read(model_name_or_path, **kwargs)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str | None = None
) -> None:
    """The same from tensors under their file keys. parameter_prefix: accepted, not needed."""
    from .model import PeftModel

    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel) and model.prompt_configs is not None:
        _swap_prompt(model, adapter_name, state_dict, config)
        return
    tuner: Any = model.base_model if isinstance(model, PeftModel) else state.tuner_of(model)
    tuner.known(adapter_name)
    compatible(tuner.peft_config[adapter_name], config)
    if any(adapter_name in layer.merged_adapters for _, layer in tuner.adapted_layers()):
        raise AdapterError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before swapping it")
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    _Swap(tuner, adapter_name, config, prefix, state_dict).run()


def compatible(old: Any, new: Any) -> None:
    """Raise ValueError where the second config's adapter cannot take the place of the first's."""
    kinds = [str(getattr(c.peft_type, "value", c.peft_type)) for c in (old, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    for key in _SAME:
        a, b = old.get(key), new.get(key)
        if a != b:
            raise ValueError(f"Configs are incompatible: for {key}, {a} != {b}")
    methods = [registry.method_of(c) for c in (old, new)]
    if methods[0] is not methods[1]:
        raise ValueError(f"Configs are incompatible: {methods[0].name} and {methods[1].name} are different variants")


class _Swap:
    """One swap on a model with adapted layers."""

    def __init__(self, tuner: Any, adapter: str, config: Any, prefix: str, tensors: dict[str, Tensor]):
        self.tuner, self.adapter, self.config, self.prefix = tuner, adapter, copy.copy(config), prefix
        self.method: Any = registry.method_of(config)
        places = list(state.places(tuner, adapter, prefix))
        own = {p.key for p in places}
        self.given = {k if k in own else state._clean(k, adapter): t for k, t in tensors.items()}
        stray = sorted(set(self.given) - own)
        if stray:
            said = ", ".join(_as_loaded(k, adapter) for k in stray[:8])
            raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {said}")
        self.places = {p.key: p for p in places}
        old = tuner.peft_config[adapter]
        self.config.inference_mode = old.inference_mode
        self.config.target_modules = old.get("target_modules")
        if self.method.changes_base(config):
            raise ValueError(f"{self.method.name}'s initial value changed the base's weight, so it cannot be swapped")

    def run(self) -> None:
        layers = [(path, m) for path, m in self.tuner.adapted_layers() if self.adapter in m.entries]
        configs = {path: self._config(path, m) for path, m in layers}
        writes = {path: self._of_layer(path, m, configs[path]) for path, m in layers}
        shared = self._shared()
        whole = [
            _Write(p.holder, p.leaf, self.given[k])
            for k, p in self.places.items()
            if p.spec is None and k in self.given
        ]
        for w in whole:
            if getattr(w.holder, w.leaf).shape != w.value.shape:
                raise ValueError(f"Hot swapping: {w.leaf} of a whole module differs in shape")
        silent = [(path, m) for path, m in layers if writes[path] is None]
        self._silence(silent, {id(getattr(w.holder, w.leaf)) for ws in writes.values() for w in ws or ()})
        fixed = all(isinstance(m.scaling[self.adapter], Tensor) for _, m in layers)
        for path, m in layers:
            specs = self.method.tensors(configs[path], m.site)
            ws = writes[path]
            self._settle(m, configs[path], self._zeros(m, specs) if ws is None and not fixed else ws or [], specs)
        for w in [*shared, *whole]:
            _write(w)
        self.tuner.peft_config[self.adapter] = self.config
        if fixed:
            fit_config(self.tuner, self.adapter)
        else:
            self.tuner.host.version += 1  # a prepared model keeps what it compiled

    def _config(self, path: str, m: Adapted) -> Any:
        """The new config of one layer. What the method found for the layer when it was made (frozen tensors that are in
        no file, places in a draw) stays, so the settings behind it must be the same."""
        entry, new = m.entries[self.adapter], self.config.for_layer(path)
        names = {f.name for f in dataclasses.fields(new)}
        found = {k: v for k, v in vars(entry.cfg).items() if k not in names}
        if found or any(not s.save for s in [*entry.specs.values(), *entry.shared.values()]):
            differ = [k for k in sorted(names - _FREE - _START) if entry.cfg.get(k) != new.get(k)]
            if differ:
                raise ValueError(
                    f"Configs are incompatible: {self.method.name} on {m.site!r} is made from "
                    + ", ".join(f"{k}={entry.cfg.get(k)!r}, not {new.get(k)!r}" for k in differ)
                )
            new = copy.copy(new)
            new.__dict__.update(found)
        return new

    def _of_layer(self, path: str, m: Adapted, cfg: Any) -> list[_Write] | None:
        """The layer's new tensors, all there and of the shapes that the new config says; None: the file has none."""
        entry = m.entries[self.adapter]
        specs = self.method.tensors(cfg, m.site)
        if specs.keys() != entry.specs.keys():
            raise ValueError(f"Configs are incompatible on {m.site!r}: {sorted(specs)} != {sorted(entry.specs)}")
        keys = {k: f"{self.prefix}{path}.{s.file or k}" for k, s in specs.items() if s.save}
        if keys and not any(k in self.given for k in keys.values()):
            return None
        missing = [k for k in keys.values() if k not in self.given]
        if missing:
            raise RuntimeError(f"Hot swapping the adapter did not succeed, missing keys: {', '.join(missing)}")
        out = []
        for key, file_key in keys.items():
            value, spec = self.given[file_key], specs[key]
            holder, leaf = entry.where[attribute(key)]
            if tuple(value.shape) not in (spec.shape, tuple(getattr(holder, leaf).shape)):
                raise ValueError(f"{file_key}: {tuple(value.shape)} in the file, {spec.shape} by its config")
            if isinstance(m.scaling[self.adapter], Tensor):
                value = self._fitted(value, getattr(holder, leaf), file_key, m.site.groups)
            out.append(_Write(holder, leaf, value))
        return out

    def _fitted(self, value: Tensor, room: Tensor, key: str, groups: int) -> Tensor:
        """Padded to the rank that the model was prepared for; a larger one takes the place as it is."""
        if all(a <= b for a, b in zip(value.shape, room.shape, strict=True)):
            return padded(value, room, groups)
        warnings.warn(
            f"{key}: {tuple(value.shape)} is larger than {tuple(room.shape)}, which the model was prepared for, so a "
            "compiled model is compiled again; give prepare_model_for_compiled_hotswap a larger target_rank",
            PeftWarning,
            stacklevel=5,
        )
        return value

    def _shared(self) -> list[_Write]:
        """Tensors that layers share, where the file has them; else those that are here serve on."""
        specs = {id(s) for s in self.tuner.shared_specs.get(self.adapter, {}).values()}
        found = [(p, self.given[p.key]) for p in self.places.values() if id(p.spec) in specs and p.key in self.given]
        for p, value in found:
            if value.shape != p.get().shape:
                raise ValueError(
                    f"Hot swapping: {p.key} is {tuple(p.get().shape)} here and {tuple(value.shape)} in the file"
                )
        missing = [p.key for p in self.places.values() if id(p.spec) in specs and p.saved and p.key not in self.given]
        if missing:
            raise RuntimeError(f"Hot swapping the adapter did not succeed, missing keys: {', '.join(missing)}")
        return [_Write(p.holder, p.leaf, value) for p, value in found]

    def _silence(self, layers: list[tuple[str, Adapted]], used: set[int]) -> None:
        """Layers that the file leaves out: zero where that changes nothing. Raises, with all as it was, where not."""
        kept = []
        for _, m in layers:
            own = [
                getattr(h, n)
                for k in m.entries[self.adapter].specs
                for h, n in [m.entries[self.adapter].where[attribute(k)]]
            ]
            kept += [(t, t.detach().clone()) for t in own]
            with torch.no_grad():
                for t in own:
                    if id(t) not in used:
                        t.zero_()
            if not is_identity(m, self.adapter):
                with torch.no_grad():
                    for t, before in kept:
                        t.copy_(before)
                raise RuntimeError(
                    f"Hot swapping the adapter did not succeed: the file has no tensors for {m.site!r}, and "
                    f"{self.method.name} cannot be made to stand still there; unload it and load the other one"
                )

    def _zeros(self, m: Adapted, specs: dict[str, Spec]) -> list[_Write]:
        """For a layer that stands still, zeros of the sizes that the new config says."""
        places = {k: m.entries[self.adapter].where[attribute(k)] for k in specs}
        return [
            _Write(*places[k], torch.zeros(s.shape)) for k, s in specs.items() if getattr(*places[k]).shape != s.shape
        ]

    def _settle(self, m: Adapted, cfg: Any, writes: list[_Write], specs: dict[str, Spec]) -> None:
        entry = m.entries[self.adapter]
        entry.cfg, entry.specs = cfg, specs
        for w in writes:
            _write(w)
        scaling = self.method.scaling(cfg)
        now = m.scaling[self.adapter]
        if isinstance(now, Tensor):
            now.fill_(scaling)
        else:
            m.scaling[self.adapter] = scaling
            m.changed()


def _as_loaded(key: str, adapter: str) -> str:
    """A file's key as the model would call it: "lin.lora_A.weight" -> "lin.lora_A.default.weight"."""
    path, dot, leaf = key.rpartition(".")
    return f"{path}.{adapter}.{leaf}" if dot and leaf in ("weight", "bias") else f"{key}.{adapter}"


def _write(w: _Write) -> None:
    """In place where the sizes are equal and no other adapter holds the same tensor (BufferDict.twin)."""
    old = getattr(w.holder, w.leaf)
    value = w.value.to(device=old.device, dtype=old.dtype)
    others = w.holder.items() if isinstance(w.holder, BufferDict) else ()
    with torch.no_grad():
        if old.shape == value.shape and all(t is not old or name == w.leaf for name, t in others):
            old.copy_(value)
        elif isinstance(old, nn.Parameter):
            old.data = value
        else:
            setattr(w.holder, w.leaf, value)


def _swap_prompt(model: Any, adapter: str, tensors: dict[str, Tensor], config: Any) -> None:
    model.known(adapter)
    compatible(model.peft_config[adapter], config)
    before = model.peft_config[adapter].inference_mode
    prompts.load_tensors(model, adapter, tensors)
    model.peft_config[adapter] = copy.copy(config)
    model.peft_config[adapter].inference_mode = before
