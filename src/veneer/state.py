"""Tensor names <-> checkpoint keys: what an adapter's file holds, and putting a file's tensors in place.

A file's key is "base_model.model." + layer path + tensor name without the adapter's name, as peft writes it. Tensors
shared between layers stand directly under "base_model.". Only declared tensors are walked; the base's state dict is
never gathered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import convert, sharded, share
from .errors import AdapterError, LoadError
from .kinds import Spec
from .load_report import LoadReport
from .storage import BufferDict
from .walk import walk

if TYPE_CHECKING:
    from .tuner import Tuner


@dataclass
class Place:
    """Where one checkpoint tensor lives: getattr(holder, leaf)."""

    key: str
    holder: Any
    leaf: str
    spec: Spec | None = None  # None: part of a whole module or a bias of the base
    saved: bool = True

    def get(self) -> Tensor:
        return getattr(self.holder, self.leaf)


def places(tuner: Tuner, adapter: str, prefix: str = "base_model.model.") -> Iterator[Place]:
    """Every tensor of an adapter with its file key."""
    root = prefix.removesuffix("model.") if prefix.endswith("model.") else prefix
    for path, key, spec, holder, leaf in tuner.tensor_names(adapter):
        full = f"{prefix}{path}.{key}" if path else f"{root}{key}"
        yield Place(full, holder, leaf, spec, spec.save)
    yield from module_places(tuner.model, adapter, prefix)
    yield from _bias_places(tuner, adapter, prefix)


def module_places(model: nn.Module, adapter: str, prefix: str) -> Iterator[Place]:
    """Tensors of modules_to_save copies: under the module's own name."""
    from .replace import SavedModule

    for path, wrapper in walk(model):
        if isinstance(wrapper, SavedModule) and adapter in wrapper.modules_to_save:
            copied = wrapper.modules_to_save[adapter]
            for name, module in copied.named_modules():
                dropped = module._non_persistent_buffers_set
                own = [n for n, p in module._parameters.items() if p is not None]
                own += [n for n, b in module._buffers.items() if b is not None and n not in dropped]
                for leaf in own:
                    yield Place(".".join(x for x in (prefix + path, name, leaf) if x), module, leaf)


def _bias_places(tuner: Tuner, adapter: str, prefix: str) -> Iterator[Place]:
    """The base's biases that bias="all" or "<method>_only" trains."""
    mode = getattr(tuner.peft_config[adapter], "bias", "none")
    if mode in (None, "none"):
        return
    adapted = {path for path, layer in tuner.adapted_layers() if adapter in layer.entries}
    for path, module in tuner.model.named_modules():
        if module._parameters.get("bias") is None or ".lora_" in f".{path}" or ".modules_to_save." in path:
            continue
        if mode == "all" or (path.removesuffix(".base_layer") in adapted and path.endswith(".base_layer")):
            yield Place(f"{prefix}{path}.bias", module, "bias")


def collect(
    tuner: Tuner,
    adapter: str,
    prefix: str = "base_model.model.",
    *,
    compact: bool = False,
    given: dict[str, Tensor] | None = None,
    meta: bool = False,
) -> dict[str, Tensor]:
    """File key -> tensor. compact: tensors that layers share once (only veneer reads it). given: a state dict of the
    model, gathered from shards, say, whose tensors stand in for the model's own. meta: take tensors without data."""
    saved = [p for p in places(tuner, adapter, prefix) if p.saved]
    if given is None:
        out = {p.key: p.get().detach() for p in saved}
    else:
        out = _given(saved, given, adapter)
    for key, t in out.items():
        if meta and t.is_meta:
            continue
        if t.is_meta or (t.numel() == 0 and 0 not in _declared_shape(tuner, adapter, key, prefix)):
            raise AdapterError(
                f"{key} holds no data ({'meta device' if t.is_meta else 'empty'}): parameters that are sharded or "
                "offloaded must be gathered before saving"
            )
    out = _method(tuner, adapter).to_disk(tuner.peft_config[adapter], out)
    return share.compact(out, tuner, adapter) if compact else out


def _given(saved: list[Place], given: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors out of a full state dict; buffers, which are never sharded, may be missing from it."""
    wanted = {_clean(p.key, adapter): p for p in saved}
    found = {_clean(k, adapter): t for k, t in given.items()}
    for key, p in wanted.items():  # a file may call a tensor by its container alone
        found.setdefault(key, found.get(f"{key}.{p.leaf}"))  # type: ignore[arg-type]
    found = {k: t for k, t in found.items() if t is not None}
    missing = [p.key for k, p in wanted.items() if k not in found and isinstance(p.get(), nn.Parameter)]
    if missing:
        raise AdapterError(f"the state dict given to save has no {missing[0]} ({len(missing)} tensors are missing)")
    out = {}
    for key, p in wanted.items():
        name = "".join(p.key.split("_fsdp_wrapped_module."))
        out[name] = (found[key] if key in found else p.get()).detach()
    return out


def _method(tuner: Tuner, adapter: str) -> Any:
    from .registry import method_of

    return method_of(tuner.peft_config[adapter])


def _declared_shape(tuner: Tuner, adapter: str, key: str, prefix: str) -> tuple[int, ...]:
    for p in places(tuner, adapter, prefix):
        if p.key == key and p.spec is not None:
            return p.spec.shape
    return (1,)


def _clean(key: str, adapter: str) -> str:
    """A key as current files have it: wrappers' names and the adapter's own name taken out."""
    for noise in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        key = key.replace(noise, "")
    key = key.removeprefix("module.")
    key = key.replace(f".modules_to_save.{adapter}.", ".").replace(".modules_to_save.", ".")
    return key.removesuffix(f".{adapter}") if key.endswith(f".{adapter}") else key.replace(f".{adapter}.", ".")


def put(
    tuner: Tuner,
    adapter: str,
    tensors: dict[str, Tensor],
    prefix: str = "base_model.model.",
    *,
    ignore_mismatched_sizes: bool = False,
    extra: Callable[[str, Tensor], bool] | None = None,
) -> LoadReport:
    """Assign a file's tensors to an adapter. Nothing is changed for a tensor whose shape differs.

    extra(key, tensor) may take keys that are not the adapter's (saved embeddings).
    """
    report = LoadReport()
    tensors = convert.own_part(tuner, adapter, share.expand(tensors, tuner, adapter), prefix)
    shapes = {p.key: tuple(p.get().shape) for p in places(tuner, adapter, prefix)}
    tensors = _method(tuner, adapter).from_disk(tuner.peft_config[adapter], tensors, shapes)
    wanted = list(places(tuner, adapter, prefix))
    own = {place.key for place in wanted}
    left: dict[str, str] = {}
    for k in tensors:  # a tensor that a file holds under an old and a current name is read by the current one
        clean = k if k in own else _clean(k, adapter)  # an adapter named "0" is not each layer's number
        if clean == k or clean not in left:
            left[clean] = k
    made: dict[int, nn.Parameter] = {}
    for place in wanted:
        source = left.pop(place.key, None) or left.pop(_clean(place.key, adapter), None)
        if source is None:
            if place.saved:
                report.missing_keys.append(place.key)
            continue
        _assign(place, tensors[source], report, made, tuner)
    for key, source in left.items():
        if extra is None or not extra(key, tensors[source]):
            report.unexpected_keys.append(source)
    if ignore_mismatched_sizes:
        report.mismatched_keys.clear()
    for _, layer in tuner.adapted_layers():
        layer.changed()
        if (entry := layer.entries.get(adapter)) is None:
            continue
        if layer.site.stored.is_meta:
            layer.waiting.add(adapter)
        else:
            entry.method.restore(layer.view(adapter), entry.cfg, sharded.whole_weight(layer.site))
    return report


def _assign(place: Place, value: Tensor, report: LoadReport, made: dict[int, nn.Parameter], tuner: Tuner) -> None:
    old = place.get()
    if old.shape != value.shape:
        report.mismatched_keys.append(f"{place.key}: file {tuple(value.shape)}, model {tuple(old.shape)}")
        return
    device = base_device(place, old, tuner)
    value = value.to(device=device, dtype=old.dtype)
    report.loaded += 1
    if not isinstance(old, nn.Parameter):
        shared = isinstance(place.holder, BufferDict) and any(place.holder is m for m in tuner._modules.values())
        setattr(place.holder, place.leaf, place.holder.twin(value) if shared else value)
    elif id(old) in made:  # the same tensor under several names: shared between layers
        place.holder._parameters[place.leaf] = made[id(old)]
    elif old.is_meta:
        made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
        made[id(made[id(old)])] = made[id(old)]
        place.holder._parameters[place.leaf] = made[id(old)]
    elif sharded.is_sharded(old):  # FSDP holds on to the memory itself
        with torch.no_grad():
            old.copy_(sharded.like(value, old))
    else:
        old.data = value


def base_device(place: Place, old: Tensor, tuner: Tuner) -> torch.device:
    """Where a loaded tensor goes: where its place is, or for a place without memory, where the base is."""
    if not old.is_meta:
        return old.device
    for p in tuner.model.parameters():
        if not p.is_meta:
            return p.device
    return torch.device("cpu")


def read(
    source: str | os.PathLike, subfolder: str | None = None, device: str = "cpu", **hub: Any
) -> tuple[dict[str, Tensor], str]:
    """An adapter's tensors and the path they came from; safetensors first, then an old .bin (weights only)."""
    from .files import BIN_NAME, SAFE_NAME, locate, read_tensors

    for name in (SAFE_NAME, BIN_NAME):
        path = locate(source, name, subfolder=subfolder, **hub)
        if path is not None:
            return read_tensors(path, device), path
    where = os.path.join(os.fspath(source), subfolder or "")
    raise ValueError(f"Can't find weights for {where}: neither {SAFE_NAME} nor {BIN_NAME} is there")


def only(tensors: dict[str, Tensor], model: Any, adapter: str) -> dict[str, Tensor]:
    """From a full state dict (gathered from shards, say) the tensors of one adapter, under their file keys."""
    from . import hub, prompts

    if model.prompt_configs is None:
        return collect(model.base_model, adapter, given=tensors)
    wanted = hub.tensors_of(model, adapter)
    cleaned = {k if k in wanted else _clean(k, adapter): t for k, t in tensors.items()}
    if any(k.startswith(f"prompt_encoder.{adapter}.") for k in tensors):  # a file has the finished prompt in its place
        cleaned.update(prompts.saved_tensors(model, adapter, tensors))
    missing = [k for k in wanted if k not in cleaned]
    if missing:
        raise AdapterError(f"the state dict given to save has no {missing[0]} ({len(missing)} tensors are missing)")
    return {k: cleaned[k] for k in wanted}


def _inner(model: Any, state_dict: dict[str, Tensor] | None) -> tuple[Any, dict[str, Tensor] | None]:
    """The model inside the wrappers of torch.compile and of training on several devices, and its whole state dict
    where the wrapper has sharded it."""
    while True:
        kind = type(model).__name__
        if kind == "OptimizedModule":
            model = model._orig_mod
        elif kind in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        elif kind == "FullyShardedDataParallel":
            state_dict = model.state_dict() if state_dict is None else state_dict
            model = model.module
        else:
            return model, state_dict


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """File key -> tensor of one adapter, of a PeftModel or of a model that inject_adapter_in_model changed (of that,
    tensors that wait on the meta device too)."""
    from . import hub, vocabulary
    from .model import PeftModel

    model, state_dict = _inner(model, state_dict)
    if isinstance(model, PeftModel):
        out = hub.tensors_of(model, adapter_name) if state_dict is None else only(state_dict, model, adapter_name)
        out.update(vocabulary.embeddings(model, adapter_name, save_embedding_layers))
        return out
    return collect(tuner_of(model), adapter_name, prefix="", given=state_dict, meta=True)


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadReport:
    """Put tensors under their file keys into an adapter; the report names what is missing or unexpected."""
    from . import hub
    from .model import PeftModel

    model, _ = _inner(model, {})
    if isinstance(model, PeftModel):
        report = hub.put(
            model, adapter_name, peft_model_state_dict, ignore_mismatched_sizes=ignore_mismatched_sizes, biases=True
        )
    else:
        report = put(
            tuner_of(model), adapter_name, peft_model_state_dict, "", ignore_mismatched_sizes=ignore_mismatched_sizes
        )
    if report.mismatched_keys and not ignore_mismatched_sizes:
        raise LoadError(f"tensors of adapter {adapter_name!r} do not fit:\n{report.text()}")
    return report


def tuner_of(model: nn.Module) -> Tuner:
    """The Tuner behind a model that inject_adapter_in_model changed."""
    from .tuner import Tuner

    if isinstance(model, Tuner):
        return model
    found = model.__dict__.get("_veneer_tuner")
    if found is None:
        raise AdapterError(
            f"{type(model).__name__} holds no adapters; call inject_adapter_in_model or get_peft_model first"
        )
    return found[0]
