"""Trained embedding rows as the engine sees them: the `trainable_token_indices` option of other methods'
configs, and heads tied to the embedding, which use the same rows.

Two modules are tied where they hold one and the same weight. Their adapters then hold one and the same
tensor; the head's name for it is a second key of state dicts, and of files where the whole adapter is trained
rows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from . import registry, storage
from .errors import AdapterError, NoMatchingPeftModuleError, PeftWarning
from .layer import Adapted
from .parameters import plain_modules
from .patterns import near_names
from .replace import TokenHolder
from .site import site_of
from .tying import partners

if TYPE_CHECKING:
    from .inject import Target
    from .kinds import Method
    from .tuner import Tuner

DELTA = "trainable_tokens_delta"


def _at(model: nn.Module, path: str) -> tuple[nn.Module, str, Any]:
    where, _, leaf = path.rpartition(".")
    parent = model.get_submodule(where) if where else model
    return parent, leaf, parent._modules[leaf]


def share_rows(layer: Adapted, source: Adapted, name: str, *, save: bool) -> None:
    """Make `layer`'s trained rows for adapter `name` the very tensor of `source`."""
    box, own = source._modules[DELTA], layer._modules[DELTA]
    if own is not box:
        storage.remove(layer, DELTA, name)
        if len(own):  # type: ignore[arg-type]
            raise AdapterError(
                f"{layer.site!r} is tied to {source.site!r} and another adapter trains other rows of it; "
                "load the two adapters into models of their own"
            )
        layer._modules[DELTA] = box
    entry = layer.entries[name]
    entry.where[DELTA] = source.entries[name].where[DELTA]
    entry.specs[DELTA] = dataclasses.replace(entry.specs[DELTA], save=save)
    layer.changed()


def tie_targets(tuner: Tuner, name: str, method: Method, targets: Sequence[Target]) -> None:
    """Modules tied to an embedding whose rows a TRAINABLE_TOKENS adapter trains use the same rows."""
    if method.name != "TRAINABLE_TOKENS":
        return
    from .inject import Target, add_one

    there = {t.layer.site.name: t.layer for t in targets}
    for t in targets:
        if t.layer.site.kind != "embedding":
            continue
        for path in partners(tuner.model, t.layer.site.name):
            layer = there.get(path)
            if layer is None:
                parent, leaf, now = _at(tuner.model, path)
                layer = now if isinstance(now, Adapted) else _fresh(tuner, now, path, method)
                add_one(tuner, name, Target(path, layer, parent, leaf, t.cfg), method, meta=False, fill=True)
                there[path] = layer
            share_rows(layer, t.layer, name, save=True)


def _fresh(tuner: Tuner, module: Any, path: str, method: Method) -> Adapted:
    site = site_of(module, path, method.sites)
    if site is None:
        raise TypeError(
            f"trainable_token_indices cannot be applied to modules of type {type(module)} ({path}): it trains rows of "
            "embeddings and linear heads that are not adapted or saved whole in another way (take it out of "
            "target_modules and modules_to_save)"
        )
    return Adapted(site, tuner.host)


def inject_option(tuner: Tuner, name: str, cfg: Any, *, meta: bool, fill: bool) -> None:
    """Train the rows that a config's `trainable_token_indices` names: a list for the input embedding, or
    {module name: list}.

    Raises NoMatchingPeftModuleError for a name that matches nothing, ValueError where ensure_weight_tying meets
    tied modules with different rows or modules_to_save has the module too, TypeError where it is adapted in another way
    or of another kind.
    """
    asked = getattr(cfg, "trainable_token_indices", None)
    if not asked:
        return
    method = registry.method("TRAINABLE_TOKENS")
    rows = dict(_named(tuner, asked))
    whole = getattr(cfg, "modules_to_save", None) or []
    twice = [path for path in rows if path.endswith(tuple([whole] if isinstance(whole, str) else whole))]
    if twice:
        raise ValueError(
            f"The embedding layer is already marked to be trained fully: {', '.join(twice)} is in modules_to_save and "
            "in trainable_token_indices; take it out of one of them"
        )
    if getattr(cfg, "ensure_weight_tying", False) and not any(partners(tuner.model, path) for path in rows):
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (no other module holds the weight of "
            f"{', '.join(rows)}). Weight tying will not be applied for trainable_token_indices.",
            PeftWarning,
            stacklevel=2,
        )
    layers: dict[str, Adapted] = {}
    for path, ids in rows.items():
        layers[path] = _add(tuner, name, path, ids, method, meta=meta, fill=fill)
    for path, ids in rows.items():
        if layers[path].site.kind != "embedding":
            continue
        for other in partners(tuner.model, path):
            if other in rows and set(rows[other]) != set(ids):
                if getattr(cfg, "ensure_weight_tying", False):
                    raise ValueError(
                        "Cannot ensure weight tying when different token indices are specified for tied "
                        "layers. "
                        f"Conflicting layers: {path}: {ids}, {other}: {rows[other]}. Please use the same "
                        "indices for "
                        "all tied layers or set ensure_weight_tying=False."
                    )
                continue
            layer = layers.get(other)
            if layer is None or rows.get(other) != ids:
                if layer is not None:
                    layer.delete_adapter(name)
                layer = _add(tuner, name, other, ids, method, meta=False, fill=True)
            share_rows(layer, layers[path], name, save=False)


def _named(tuner: Tuner, asked: Any) -> Iterator[tuple[str, list[int]]]:
    from .methods.trainable_tokens import input_embedding

    if not isinstance(asked, dict):
        path = input_embedding(tuner.model)
        if path is None:
            raise AdapterError(
                f"trainable_token_indices is a list and {type(tuner.model).__name__} names no input "
                "embedding; "
                "give {layer name: list}"
            )
        yield path, list(asked)
        return
    plain = [path for path, _ in plain_modules(tuner.model)]
    for pattern, ids in asked.items():
        hits = [path for path in plain if path == pattern or path.endswith(f".{pattern}")]
        if not hits:
            raise NoMatchingPeftModuleError(
                f"trainable_token_indices: Target modules {{{pattern!r}}} not found in the base model. "
                f"{type(tuner.model).__name__} has no such module"
                f"{near_names(pattern, plain)}"
            )
        for path in hits:
            yield path, list(ids)


def _add(tuner: Tuner, name: str, path: str, ids: list[int], method: Any, *, meta: bool, fill: bool) -> Adapted:
    from .inject import Target, add_one

    cfg = method.Config(token_indices=ids)
    parent, leaf, now = _at(tuner.model, path)
    if isinstance(now, TokenHolder):
        holder, layer = now, now.token_adapter
    else:
        layer = _fresh(tuner, now, path, method)
        method.check(cfg, layer.site)
        holder = TokenHolder(layer)
        parent._modules[leaf] = holder
    method.check(cfg, layer.site)  # type: ignore[arg-type,union-attr]
    add_one(tuner, name, Target(path, layer, holder, "token_adapter", cfg), method, meta=meta, fill=fill)  # type: ignore[arg-type]
    return layer  # type: ignore[return-value]
