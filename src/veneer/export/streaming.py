"""Merging shard by shard: the merged weight of one layer at a time, from mapped files to files.

Memory holds the adapter, one tensor in float32 with its merged self, and what the system keeps of the mapped files.
Adapters that rewrite the base when they are loaded (PiSSA and kin) hold the rewritten weights beside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, CannotMerge
from ..layer import Adapted
from ..replace import SavedModule, TokenHolder
from .mapped import INDEX, SINGLE, Mapped
from .shard_file import NAMES, Plan, is_complete, size_of, write_shard

__all__ = ["Target", "stream_merge", "targets_of"]

PROGRESS = "merge_progress.json"


@dataclass
class Target:
    """One tensor of the merged model: where it stands now, and the adapted layers that change it."""

    name: str
    module: nn.Module
    leaf: str
    layers: list[Adapted]

    @property
    def now(self) -> Tensor:
        return getattr(self.module, self.leaf)


def _final(module: nn.Module, found: list[Adapted]) -> nn.Module:
    """The plain module behind wrappers; adapted layers on the way are noted."""
    while getattr(module, "is_adapter_wrapper", False):
        if isinstance(module, Adapted):
            found.append(module)
            module = module.base_layer
        elif isinstance(module, SavedModule):
            module = module.unwrapped(None)
        else:
            assert isinstance(module, TokenHolder)
            module = module.token_adapter
    return module


def targets_of(model: nn.Module) -> Iterator[Target]:
    """Every parameter and saved buffer of the model as it will be without adapters, with its plain name."""

    def walk(module: nn.Module, path: str) -> Iterator[Target]:
        layers: list[Adapted] = []
        module = _final(module, layers)
        dropped = module._non_persistent_buffers_set
        own = [n for n, p in module._parameters.items() if p is not None]
        own += [n for n, b in module._buffers.items() if b is not None and n not in dropped]
        for leaf in own:
            yield Target(f"{path}{leaf}", module, leaf, layers)
        for name, child in module.named_children():
            yield from walk(child, f"{path}{name}.")

    yield from walk(model, "")


@contextmanager
def _merged(target: Target, safe: bool) -> Iterator[Tensor]:
    """The target's merged value, on the module while the block lasts."""
    had = {n for n, p in target.module._parameters.items() if p is not None}
    try:
        for layer in reversed(target.layers):
            layer.merge(safe_merge=safe)
        grown = [n for n, p in target.module._parameters.items() if p is not None and n not in had]
        if grown:
            raise CannotMerge(
                f"{target.name.rpartition('.')[0]} has no {grown[0]}, and merging would give it one, which the model's "
                "class would not load; keep the adapter unmerged"
            )
        yield target.now
    finally:
        for layer in target.layers:
            layer.unmerge()


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.to(dtype) if dtype is not None and t.is_floating_point() else t


def stream_merge(
    mapped: Mapped,
    tuner_model: nn.Module,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    safe: bool = False,
    fingerprint: str = "",
    on_shard: Callable[[str, bool], None] | None = None,
) -> int:
    """Write the weights of the merged model into the folder `out`, in the shards of its base; returns their bytes.

    tuner_model: mapped.model with its adapters in it. A run that was cut off goes on where it stopped: shards that
    are complete under the same fingerprint are kept. on_shard(name, kept) reports each.

    Raises CannotMerge before anything is written, ValueError with `safe` where a weight is not finite.
    """
    targets = {t.name: t for t in targets_of(tuner_model)}
    _check(targets)
    plans, alias = _plans(mapped, targets, dtype)
    out.mkdir(parents=True, exist_ok=True)
    _resume(out, fingerprint)
    total = 0
    for shard, plan in plans.items():
        kept = is_complete(out / shard, plan)
        if not kept:
            write_shard(out / shard, plan, ((k, v) for k in plan for v in _values(targets[k], safe, dtype)))
        total += sum(size_of(*p) for p in plan.values())
        if on_shard is not None:
            on_shard(shard, kept)
    if len(plans) > 1 or SINGLE not in plans:
        weight_map = {k: shard for shard, plan in plans.items() for k in plan}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (out / PROGRESS).unlink()
    _config(mapped.model, alias, dtype, out)
    return total


def _values(target: Target, safe: bool, dtype: torch.dtype | None) -> Iterator[Tensor]:
    with _merged(target, safe) as value:
        yield _cast(value, dtype)


def _check(targets: dict[str, Target]) -> None:
    for t in targets.values():
        for layer in t.layers:
            for name in layer.active_adapters:
                if name in layer.entries and not layer.entries[name].method.mergeable:
                    method = layer.entries[name].method.name.lower()
                    raise CannotMerge(f"{method} on {t.name} depends on the input, so no weight equals it")
    lost = [t.name for t in targets.values() if t.now.is_meta]
    if lost:
        raise AdapterError(
            f"neither the base nor the adapter holds {lost[0]} ({len(lost)} tensors); nothing was written"
        )


def _plans(mapped: Mapped, targets: dict[str, Target], dtype: torch.dtype | None) -> tuple[dict[str, Plan], bool]:
    """What goes into which file; and whether tied weights stay tied."""
    plans: dict[str, Plan] = {}
    homes = list(dict.fromkeys(mapped.shard_of.values()))
    first: dict[int, Target] = {}
    tied = True
    for t in targets.values():
        value = t.now
        other = first.setdefault(id(value), t)
        if other is not t and _same(other, t):
            continue
        tied = tied and other is t
        home = mapped.shard_of.get(t.name) or mapped.shard_of.get(other.name) or homes[-1]
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        if kind not in NAMES:
            raise AdapterError(f"{t.name} is {value.dtype}, which safetensors does not hold")
        plans.setdefault(home, {})[t.name] = (kind, tuple(value.shape))
    return {shard: plans[shard] for shard in homes if shard in plans}, tied


def _same(a: Target, b: Target) -> bool:
    """Whether two names of one weight still have one value after merging."""
    if not a.layers and not b.layers:
        return True
    with _merged(a, False) as one:
        kept = one.detach().clone()
    with _merged(b, False) as two:
        return torch.equal(kept, two)


def _resume(out: Path, fingerprint: str) -> None:
    """Keep a cut-off run's shards if they come from the same inputs; else start anew."""
    record = out / PROGRESS
    if record.is_file() and record.read_text(encoding="utf-8") == fingerprint and fingerprint:
        return
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    record.write_text(fingerprint, encoding="utf-8")


def _config(model: Any, tied: bool, dtype: torch.dtype | None, out: Path) -> None:
    import copy

    config = copy.deepcopy(model.config)
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if getattr(config, "tie_word_embeddings", False) and embeddings is not None:
        config.tie_word_embeddings = tied and not _untied(model)
    if dtype is not None:
        config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    if getattr(model, "generation_config", None) is not None and getattr(model, "can_generate", lambda: False)():
        model.generation_config.save_pretrained(out)


def _untied(model: Any) -> bool:
    """Whether a copy trained whole took one of the tied places."""
    first, second = model.get_input_embeddings(), model.get_output_embeddings()
    if first is None or second is None:
        return False
    one, two = (_final(m, []) for m in (first, second))
    return getattr(one, "weight", None) is not getattr(two, "weight", None)


def fingerprint_of(adapter: Path, base: Path, files: list[str], **settings: Any) -> str:
    """What a cut-off run must share to go on: the adapter's bytes, the base's files by size and time, the settings."""
    digest = hashlib.sha256()
    for path in sorted(p for p in adapter.iterdir() if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    stats = [(f, os.stat(base / f).st_size, os.stat(base / f).st_mtime_ns) for f in files]
    return json.dumps({"adapter": digest.hexdigest(), "base": stats, **settings}, sort_keys=True)
