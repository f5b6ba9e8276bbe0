"""The base's mark: a few numbers of a few of its weights, kept in the header of an adapter's file, so that loading on
another base is noticed. It costs microseconds, survives a change of dtype, and other libraries skip it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PeftWarning
from .layer import Adapted
from .replace import Wrapper

__all__ = ["KEY", "compare", "lines", "mark_of", "read_mark", "warn_if_other"]

KEY = "veneer_base"
WEIGHTS, NUMBERS, ROWS = 16, 8, 64
"""Weights sampled, numbers of each, and the rows at its beginning that they come from (a vocabulary may grow)."""
TOLERANCE = 0.01
"""Difference over the largest sampled number that a change of dtype explains (bfloat16 rounds by 0.004)."""


def mark_of(model: nn.Module) -> dict[str, Any] | None:
    """{"name", "revision", "weights": {path: {"shape", "values"}}, "hash"} of a base with adapters in it; None where no
    weight can be read (meta, packed or sharded ones)."""
    found = dict(_weights(model, frozen=True))
    names = sorted(found)
    chosen = [names[i * (len(names) - 1) // max(WEIGHTS - 1, 1)] for i in range(WEIGHTS)] if names else []
    weights: dict[str, dict[str, Any]] = {
        n: {"shape": list(found[n].shape), "values": _sample(found[n])} for n in dict.fromkeys(chosen)
    }
    if not weights:
        return None
    digest = hashlib.sha256()
    for path, held in weights.items():
        digest.update(path.encode() + struct.pack(f"<{len(held['values'])}f", *held["values"]))
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    revision = getattr(config, "_commit_hash", None)
    return {"name": name or None, "revision": revision, "weights": weights, "hash": digest.hexdigest()[:16]}


def _weights(model: nn.Module, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The base's own matrices, under the names that they have without adapters. frozen: those that do not train.

    What the base's files lacked (a pooler, a head) is drawn anew each time it is loaded, and left out.
    """
    changed = set()
    read = any(_from_file(p) for p in model.parameters())
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            rewrites = any(e.method.changes_base(e.cfg) for e in module.entries.values())
            if rewrites or module.merged_adapters:
                changed.add(path)
        elif isinstance(module, Wrapper):
            changed.add(path)
    for path, p in model.named_parameters():
        parts = path.split(".")
        plain = type(p) is nn.Parameter and p.dtype.is_floating_point and not p.is_meta
        if not plain or p.dim() < 2 or (frozen and p.requires_grad) or (read and not _from_file(p)):
            continue
        parents = {".".join(parts[:i]) for i in range(len(parts))}
        if parents & changed:
            continue
        inside = [i for i in range(len(parts)) if isinstance(_at(model, parts[:i]), Adapted)]
        if inside and parts[inside[0]] != "base_layer":
            continue  # the adapter's own
        yield ".".join(part for part in parts if part != "base_layer"), p


def _from_file(p: nn.Parameter) -> bool:
    """Whether transformers says that it filled this parameter from a file; it says nothing of other models."""
    return bool(p.__dict__.get("_is_hf_initialized"))


def _at(model: nn.Module, parts: list[str]) -> nn.Module | None:
    module: Any = model
    for part in parts:
        module = module._modules.get(part)
        if module is None:
            return None
    return module


def _sample(weight: Tensor) -> list[float]:
    """NUMBERS numbers at equal distances from the first ROWS rows."""
    flat = weight.detach()[:ROWS].reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(NUMBERS, flat.numel())).long().to(flat.device)
    return [float(v) for v in flat[at].float().cpu()]


def read_mark(path: str | os.PathLike) -> dict[str, Any] | None:
    """The mark in an adapter's safetensors file, if it has one."""
    if not str(path).endswith(".safetensors"):
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        held = (f.metadata() or {}).get(KEY)
    if held is None:
        return None
    found: dict[str, Any] = json.loads(held)
    return found


def compare(mark: dict[str, Any], model: nn.Module) -> list[str]:
    """How a base differs from a mark: one line a weight, empty where it does not. Weights that cannot be read here
    (packed, on the meta device, changed by adapters) and those that this base's files lacked are left out."""
    here = dict(_weights(model))
    wrapped = {n for n, m in model.named_modules() if isinstance(m, Adapted | Wrapper)}
    names = {n for n, _ in model.named_parameters()}
    out = []
    for path, held in mark["weights"].items():
        if path not in here:
            parts = path.split(".")
            hidden = wrapped & {".".join(parts[:i]) for i in range(len(parts))}
            if path not in names and not hidden:
                out.append(f"{path} is not there")
            continue
        shape, now = held["shape"], list(here[path].shape)
        if now[1:] != shape[1:] or now[0] < min(shape[0], ROWS):
            out.append(f"{path} is {now}, was {shape}")
            continue
        old, new = torch.tensor(held["values"]), torch.tensor(_sample(here[path]))
        if old.shape != new.shape or not float((old - new).abs().max()) <= TOLERANCE * float(old.abs().max()):
            out.append(f"{path} has other values")
    return out


def warn_if_other(model: nn.Module, path: str | os.PathLike) -> None:
    """Warn (PeftWarning) where the base is not the one that the adapter in this file was trained on."""
    mark = read_mark(path)
    different = compare(mark, model) if mark is not None else []
    if mark is None or not different:
        return
    name = f" ({mark['name']}{', revision ' + mark['revision'] if mark['revision'] else ''})" if mark["name"] else ""
    warnings.warn(
        f"{path}: this adapter was trained on another base{name}: {different[0]}, {len(different)} of "
        f"{len(mark['weights'])} weights looked at differ. Load that base, or expect other answers.",
        PeftWarning,
        stacklevel=4,
    )


def lines(mark: dict[str, Any] | None) -> list[str]:
    """A card's lines about the base: its revision, where it came from the hub, and the mark's hash."""
    if mark is None:
        return []
    revision = f", revision `{mark['revision']}`" if mark["revision"] else ""
    return [f"Base{revision}, fingerprint `{mark['hash']}` (of {len(mark['weights'])} weights).", ""]
