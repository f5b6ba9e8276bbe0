"""A trained layer's A becomes the next layer's initial value: progressive training, layer by layer.

Three ways to it. `hand_off` copies once, from one named layer to another. `LayerwiseHandoff`, a callback for
transformers' Trainer, trains the blocks of one adapter one after another and hands A on between them (for any
other training loop, handoff_stages.Stages does the same). And handoff=True in a config, for one adapter a
stage: see `inherit`.

The receiving layer's B is still zero then, so a hand-off never changes what the model computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import AdapterError, PeftWarning
from .identity import broken_identity, is_identity
from .kinds import Method
from .layer import Adapted
from .layer_matrices import named_layers
from .patterns import near_names
from .share import leaf_name, refuse_own_init
from .view import attribute

if TYPE_CHECKING:
    from .tuner import Tuner

Named = Sequence[tuple[str, Adapted]]


def __getattr__(name: str) -> Any:
    if name == "LayerwiseHandoff":  # needs transformers, which takes seconds to import
        from .handoff_callback import LayerwiseHandoff

        return LayerwiseHandoff
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check(cfg: Any, method: Method) -> None:
    """Raise AdapterError where handoff=True meets initial values that are made for one layer alone."""
    if getattr(cfg, "handoff", False):
        refuse_own_init(cfg, method, "handoff")


# -- copying -----------------------------------------------------------------------------------------------
def hand_off(
    model: nn.Module, adapter: str, source: str, target: str, *, tensors: str | Sequence[str] | None = None,
    to_adapter: str | None = None,
) -> list[str]:  # fmt: skip
    """Copy a layer's trained tensors to another layer as its values; returns the names of those copied.

    source, target: layer names as `veneer.matrices` lists them ("model.layers.3.self_attn.q_proj"), or an end
    of one that fits a single layer. tensors: names such as "lora_A"; by default the method's A. to_adapter:
    the adapter that receives, where it is another one.

    Raises AdapterError for a name that is not there and for tensors of different shapes; nothing is copied
    then.
    """
    named = list(named_layers(model))
    first, second = _find(named, source), _find(named, target)
    receiver = to_adapter or adapter
    for (path, layer), name in ((first, adapter), (second, receiver)):
        if name not in layer.entries:
            have = ", ".join(map(repr, layer.entries)) or "none"
            raise AdapterError(f"hand_off: {path} has no adapter {name!r}; it has: {have}")
    wanted = [tensors] if isinstance(tensors, str) else tensors
    keys = handed_keys(first[1], adapter, wanted, first[0])
    gaps = [_gap(first[1], adapter, second[1], receiver, key) for key in keys]
    for key, gap in zip(keys, gaps, strict=True):
        if gap:
            raise AdapterError(f"hand_off: {key} of {first[0]} does not fit {second[0]}: {gap}")
    _copy(first[1], adapter, second[1], receiver, keys)
    return keys


def _find(named: Named, name: str) -> tuple[str, Adapted]:
    hits = [(p, m) for p, m in named if p == name] or [(p, m) for p, m in named if p.endswith("." + name)]
    if len(hits) == 1:
        return hits[0]
    paths = [p for p, _ in named]
    if hits:
        raise AdapterError(f"hand_off: {name!r} fits {len(hits)} layers ({hits[0][0]}, {hits[1][0]}, ...); name one")
    raise AdapterError(f"hand_off: no adapted layer {name!r}{near_names(name, paths)}")


def handed_keys(layer: Adapted, adapter: str, tensors: Sequence[str] | None, path: str) -> list[str]:
    """Storage names ("lora_A.weight") of the tensors to hand on: those named, else those whose name ends in
    A."""
    entry = layer.entries[adapter]
    trained = {k: k.partition(".")[0] for k, s in entry.specs.items() if s.train}
    have = ", ".join(dict.fromkeys(trained.values())) or "none"
    if tensors is None:
        keys = [k for k, head in trained.items() if head.endswith("_A")]
        if not keys:
            raise AdapterError(
                f"handoff on {path}: {entry.method.name} trains no A that could be handed on; it trains: "
                f"{have}. Name what to copy with tensors=[...]."
            )
        return keys
    for name in tensors:
        if name not in trained and name not in trained.values():
            raise AdapterError(f"handoff on {path}: {entry.method.name} trains no tensor {name!r}; it trains: {have}")
    return [k for k, head in trained.items() if k in tensors or head in tensors]


def _tensor(layer: Adapted, adapter: str, key: str) -> nn.Parameter:
    holder, leaf = layer.entries[adapter].where[attribute(key)]
    return getattr(holder, leaf)


def _gap(source: Adapted, adapter: str, target: Adapted, receiver: str, key: str) -> str:
    """Why a tensor cannot be copied; empty where it can."""
    mine, theirs = source.entries[adapter], target.entries[receiver]
    if mine.method is not theirs.method:
        return f"the one is {mine.method.name}, the other {theirs.method.name}"
    if key not in theirs.specs:
        return f"adapter {receiver!r} has no such tensor there"
    have, want = _tensor(source, adapter, key), _tensor(target, receiver, key)
    if have is want:
        return "the two layers share this tensor"
    if have.shape != want.shape:
        return f"shapes {tuple(have.shape)} and {tuple(want.shape)}"
    return ""


def _copy(source: Adapted, adapter: str, target: Adapted, receiver: str, keys: Sequence[str]) -> None:
    with torch.no_grad():
        for key in keys:
            _tensor(target, receiver, key).copy_(_tensor(source, adapter, key))
    target.changed()


def earlier(named: Named, path: str, layer: Adapted) -> Iterator[tuple[str, Adapted]]:
    """Layers of the same name and kind before this one, nearest first."""
    before = [p for p, _ in named].index(path)
    for name, other in reversed(named[:before]):
        if leaf_name(name) == leaf_name(path) and other.site.kind == layer.site.kind:
            yield name, other


def receive(named: Named, path: str, layer: Adapted, adapter: str, givers: Sequence[str], tensors: Any) -> str | None:
    """Give a layer the A of the nearest earlier layer that one of `givers` trained; its name, or None."""
    keys = handed_keys(layer, adapter, tensors, path)
    for name, other in earlier(named, path, layer):
        for giver in givers:
            if giver not in other.entries or is_identity(other, giver):
                continue  # an adapter that changes nothing holds random numbers, not something learned
            if any(_gap(other, giver, layer, adapter, key) for key in keys):
                continue
            _copy_keeping_output(other, giver, layer, adapter, keys)
            return name
    return None


def _copy_keeping_output(source: Adapted, giver: str, target: Adapted, adapter: str, keys: Sequence[str]) -> None:
    was = is_identity(target, adapter)
    old = {key: _tensor(target, adapter, key).detach().clone() for key in keys}
    _copy(source, giver, target, adapter, keys)
    if was and broken_identity(target, adapter):
        with torch.no_grad():
            for key, value in old.items():
                _tensor(target, adapter, key).copy_(value)
        raise AdapterError(
            f"handoff: with {', '.join(keys)} of another layer, {target.site!r} would no longer compute what "
            f"the base does; {target.entries[adapter].method.name} cannot hand this tensor on"
        )


# -- one adapter a stage -----------------------------------------------------------------------------------
def inherit(tuner: Tuner, adapter: str) -> dict[str, str]:
    """handoff=True while the model already holds adapters; returns receiving layer -> giving layer.

    For each layer i of the new adapter: its A starts as the trained A of the nearest layer before i, in model
    order, of the same name (q_proj from q_proj) and shape. Where several adapters sit on that layer, the one
    added last gives. Adapters that still change nothing are passed over, since their A is random. Layers
    without such a predecessor (the first ones) keep their own initial values. So a chain of adapters, each on
    the next layers, trains progressively:

        first  = LoraConfig(layers="0", ...)                 train it
        second = LoraConfig(layers="1", handoff=True, ...)   model.add_adapter("second", second); train it;
        ...

    For the first adapter of a model handoff=True does nothing by itself: `LayerwiseHandoff` then hands A on
    inside it.
    """
    givers = [n for n in reversed(tuner.peft_config) if n != adapter]
    if not getattr(tuner.peft_config[adapter], "handoff", False) or not givers:
        return {}
    named = list(tuner.adapted_layers())
    found = {
        path: receive(named, path, layer, adapter, givers, None) for path, layer in named if adapter in layer.entries
    }
    out = {path: giver for path, giver in found.items() if giver is not None}
    if not out:
        warnings.warn(
            f"handoff=True, and adapter {adapter!r} received nothing: no layer before its layers has the "
            "same name and shape and a trained adapter of its method (here: "
            f"{', '.join(map(repr, givers))}). It starts from its own initial values.",
            PeftWarning,
            stacklevel=2,
        )
    return out
