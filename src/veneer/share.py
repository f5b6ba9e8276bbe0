"""Tensors that several layers hold in common: share={"lora_A": "all" | "pairs" | "groups:4"}.

One A for all layers while each keeps its own B is ShareLoRA (arXiv:2406.10785, section 3); A and B tied over
layers is Tied-LoRA (arXiv:2311.09578, section 3). It works for every method and every tensor it trains per
layer.

Layers share by holding the same nn.Parameter. So `.to()`, deepcopy, optimizers, DDP and parameter counts need
no care, and the gradients of all the layers add up in it. An adapter's file holds a copy for each layer, as
peft reads it, or one for each group in a compact file.

Which layers: those of one name (q_proj with q_proj), in model order, in runs of the given length; a run whose
tensors differ in shape, dtype or device falls apart by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import AdapterError
from .identity import broken_identity, is_identity
from .kinds import Method, Replace
from .layer import Adapted
from .view import attribute

if TYPE_CHECKING:
    from .tuner import Tuner

GRAMMAR = 'the words are "all" (every layer), "pairs" (two in a row) and "groups:N" (N in a row, N at least 2)'

Named = Sequence[tuple[str, Adapted]]


def run_length(words: str) -> int | None:
    """Layers in one group; None: all of them. Raises ValueError for anything else than the grammar's
    words."""
    if words == "all":
        return None
    if words == "pairs":
        return 2
    found = re.fullmatch(r"groups:(\d+)", words) if isinstance(words, str) else None
    if found is None or int(found[1]) < 2:
        raise ValueError(f"share: {words!r} is not understood; {GRAMMAR}")
    return int(found[1])


def validate(share: Any, handoff: bool = False) -> None:
    """The syntax of a config's `share`. Raises ValueError where it is malformed or contradicts `handoff`."""
    if not isinstance(share, Mapping) or not all(isinstance(k, str) and k for k in share):
        raise ValueError(f'share={share!r}: give a dict such as {{"lora_A": "all"}}; {GRAMMAR}')
    for words in share.values():
        run_length(words)
    if handoff and share:
        raise ValueError(
            "share and handoff cannot be used together: layers that hold one tensor have nothing to hand to each other"
        )


def leaf_name(path: str) -> str:
    """A layer's name inside its block, without the block's number: "h.3.attn.q_proj" -> "q_proj"; of a
    numbered module all from the last name on ("h.3.mlp.0" -> "mlp.0"), of a stack's own member the stack
    ("layers.3" -> "layers")."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    if last == len(parts) - 1:
        return parts[-1]
    first_number = next(i for i, part in enumerate(parts) if part.isdigit())
    return parts[last] if first_number > last else ".".join(parts[last:])


def trained_heads(method: Method, cfg: Any, layer: Adapted) -> list[str]:
    """Storage names ("lora_A") of what a method trains on a layer."""
    return list(dict.fromkeys(k.partition(".")[0] for k, s in method.tensors(cfg, layer.site).items() if s.train))


def check(cfg: Any, method: Method, layers: Sequence[Adapted], configs: Sequence[Any]) -> None:
    """Raise AdapterError where a config's `share` names no trained tensor, or an initial value forbids
    sharing. Runs before any tensor is made, so that a refused config leaves the base as it was."""
    share = getattr(cfg, "share", None)
    if not share:
        return
    validate(share, bool(getattr(cfg, "handoff", False)))
    refuse_own_init(cfg, method, "share")
    known = dict.fromkeys(h for layer, c in zip(layers, configs, strict=True) for h in trained_heads(method, c, layer))
    for name in share:
        if name not in known:
            spelled = {k.lower(): k for k in known}
            near = get_close_matches(name.lower(), spelled, n=1)
            hint = f" (did you mean {spelled[near[0]]!r}?)" if near else ""
            have = ", ".join(known) or "none"
            raise AdapterError(f"share: {method.name} trains no tensor {name!r} on these layers{hint}; it has: {have}")


def refuse_own_init(cfg: Any, method: Method, option: str) -> None:
    """Some initial values are made for one layer's weight or data; another layer's would be noise there."""
    start = getattr(cfg, "init_lora_weights", None)
    if method.changes_base(cfg) or str(start).lower() == "eva":
        what = f"init_lora_weights={start!r}" if start is not None else f"{method.name}'s initial value"
        raise AdapterError(
            f"{option} cannot be used with {what}: it computes each layer's tensors from that layer's own "
            "weight or inputs, so they belong to it alone. Use the default initial values, or leave "
            f"{option} out."
        )


def tie(tuner: Tuner, adapter: str, named: Named | None = None, *, fresh: bool = False) -> None:
    """Make the layers of each group hold their first layer's Parameter. Doing it again changes nothing.

    named: (path, layer) in model order; by default those of the tuner. fresh: the tensors hold their initial
    values; then AdapterError is raised for a tensor whose initial value depends on the layer's own weight, so
    that sharing it would change the model's output.
    """
    share = getattr(tuner.peft_config[adapter], "share", None)
    if not share:
        return
    layers = [(n, m) for n, m in (tuner.adapted_layers() if named is None else named) if adapter in m.entries]
    for head, words in share.items():
        for group in _runs(layers, run_length(words)):
            _tie_run(group, adapter, head, fresh)


def tie_own(adapter: str, method: Method, cfg: Any, named: Sequence[tuple[str, Adapted]]) -> None:
    """What the method itself shares between layers (Method.ties). named: (entry of target_modules, layer), in model
    order."""
    for head, length in method.ties(cfg).items():
        alike: dict[Any, list[Adapted]] = {}
        for entry, layer in named:
            alike.setdefault((entry, layer.site.out, layer.site.inp), []).append(layer)
        for members in alike.values():
            step = length or len(members)
            for start in range(0, len(members), step):
                _tie_run(members[start : start + step], adapter, head, False)


def _runs(layers: Named, length: int | None) -> Iterator[list[Adapted]]:
    by_name: dict[tuple[str, str], list[Adapted]] = {}
    for path, layer in layers:
        by_name.setdefault((leaf_name(path), layer.site.kind), []).append(layer)
    for members in by_name.values():
        step = length or len(members)
        for start in range(0, len(members), step):
            yield members[start : start + step]


def _tie_run(run: Sequence[Adapted], adapter: str, head: str, fresh: bool) -> None:
    leaders: dict[Any, nn.Parameter] = {}
    for layer in run:
        entry = layer.entries[adapter]
        for key, spec in entry.specs.items():
            if not spec.train or key.partition(".")[0] != head:
                continue
            holder, leaf = entry.where[attribute(key)]
            own = getattr(holder, leaf)
            leader = leaders.setdefault((key, tuple(own.shape), own.dtype, own.device), own)
            if leader is not own:
                _hold(layer, adapter, key, leader, fresh)
    for layer in run:
        layer.changed()


def _hold(layer: Adapted, adapter: str, key: str, leader: nn.Parameter, fresh: bool) -> None:
    entry = layer.entries[adapter]
    holder, leaf = entry.where[attribute(key)]
    own = getattr(holder, leaf)
    was = fresh and is_identity(layer, adapter)
    setattr(holder, leaf, leader)
    if fresh and isinstance(entry.method, Replace):
        kept = own.is_meta or bool((own == leader).all())
    else:
        kept = not was or not broken_identity(layer, adapter)
    if not kept:
        setattr(holder, leaf, own)
        raise AdapterError(
            f"share: {key.partition('.')[0]!r} of {entry.method.name} starts from each layer's own weight; "
            f"with another layer's value {layer.site!r} would no longer compute what the base does. Share "
            "another tensor."
        )


# -- files -------------------------------------------------------------------------------------------------
def groups(tuner: Tuner, adapter: str, prefix: str = "base_model.model.") -> list[list[str]]:
    """File keys that one Parameter stands behind, first layer's key first; only where there are two or
    more."""
    found: dict[int, list[str]] = {}
    for path, key, spec, holder, leaf in tuner.tensor_names(adapter):
        if path and spec.train and spec.save:
            found.setdefault(id(getattr(holder, leaf)), []).append(f"{prefix}{path}.{key}")
    return [keys for keys in found.values() if len(keys) > 1]


def compact(tensors: dict[str, Tensor], tuner: Tuner, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors under their file keys, each shared tensor once: under its first layer's key."""
    spare = {k for keys in groups(tuner, adapter, _prefix(tensors)) for k in keys[1:]}
    return {k: t for k, t in tensors.items() if k not in spare}


def expand(tensors: dict[str, Tensor], tuner: Tuner, adapter: str) -> dict[str, Tensor]:
    """The same with a key for every layer; a full set comes back as it is.

    Raises AdapterError where a file holds different values for layers that share one tensor.
    """
    out = dict(tensors)
    for keys in groups(tuner, adapter, _prefix(tensors)):
        present = [k for k in keys if k in tensors]
        for key in present[1:]:
            first, other = tensors[present[0]], tensors[key]
            if first.shape == other.shape and not bool((first == other).all()):
                raise AdapterError(
                    f"the config shares one tensor between {present[0]} and {key}, and the file holds "
                    "different values for them; load it with a config without `share`"
                )
        if present:
            out.update({k: tensors[present[0]] for k in keys if k not in tensors})
    return out


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    prefix = "base_model.model."
    return prefix if any(k.startswith(prefix) for k in tensors) else ""
