"""layer_replication: a deeper stack of layers over the base's own weights. Kim et al. 2023, arXiv:2312.15166 (depth
up-scaling), with shared rather than copied weights: only the adapters make two copies of a layer differ."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import AdapterError
from .layer import Adapted
from .words import find_stacks

if TYPE_CHECKING:
    from .tuner import Tuner


def replicate(tuner: Tuner, cfg: Any) -> None:
    """Build the stack that cfg.layer_replication asks for: [first, end) ranges of the base's layers, in order.

    Once a model: a further adapter asks for the same ranges or for none. Raises ValueError for ranges that do not fit.
    """
    ranges = getattr(cfg, "layer_replication", None)
    if not ranges:
        return
    if tuner.replicated is not None:
        if [list(r) for r in ranges] != tuner.replicated:
            raise ValueError(f"layer_replication={ranges}: this model's layers are replicated as {tuner.replicated}")
        return
    path, stack = _stack(tuner.model)
    indices = _indices(ranges, len(stack))
    if any(isinstance(m, Adapted) for m in stack.modules()):
        raise AdapterError("layer_replication must be set by the model's first adapter: the layers are adapted already")
    layers = nn.ModuleList(_twin(stack[old], new) for new, old in enumerate(indices))
    parent, _, leaf = path.rpartition(".")
    setattr(tuner.model.get_submodule(parent), leaf, layers)
    _resize(getattr(tuner.model, "config", None), len(stack), indices)
    tuner.replicated = [list(r) for r in ranges]


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = [s.path for s in find_stacks(model) if isinstance(model.get_submodule(s.path), nn.ModuleList)]
    if len(found) != 1:
        what = f"{len(found)}: {', '.join(found)}" if found else "none"
        raise ValueError(
            f"Could not locate the layers attribute in the model: layer_replication needs one, it has {what}"
        )
    stack: Any = model.get_submodule(found[0])
    return found[0], stack


def _indices(ranges: Any, n: int) -> list[int]:
    out: list[int] = []
    for r in ranges if isinstance(ranges, list | tuple) else [ranges]:
        pair = isinstance(r, list | tuple) and len(r) == 2 and all(isinstance(i, int) for i in r)
        if not pair or not 0 <= r[0] < r[1] <= n:
            raise ValueError(
                f"layer_replication={ranges!r}: {r!r} is not a range [first, end) with 0 <= first < end <= {n}, the "
                "number of the model's layers"
            )
        out += range(r[0], r[1])
    return out


def _twin(layer: nn.Module, index: int) -> nn.Module:
    """The layer's modules anew, over the same parameters and buffers, at another place of the stack."""
    shared = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    configs = {id(c): c for m in layer.modules() if (c := m.__dict__.get("config")) is not None}
    twin = copy.deepcopy(layer, {**shared, **configs})
    for m in twin.modules():
        if isinstance(m.__dict__.get("layer_idx"), int):
            m.layer_idx = index  # type: ignore[assignment]  # its place in a key/value cache
    return twin


def _resize(config: Any, old: int, indices: list[int]) -> None:
    """The config's count of layers, and what it lists one entry a layer."""
    if config is None or isinstance(config, dict):
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == old and key.startswith("layer"):
            setattr(text, key, [value[i] for i in indices])
    if hasattr(text, "num_hidden_layers"):
        text.num_hidden_layers = len(indices)
