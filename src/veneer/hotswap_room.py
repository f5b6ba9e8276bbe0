"""Room for a hot swap: LoRA adapters padded to one rank, their scalings made tensors, before a model is compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from . import registry, state
from .layer import Adapted


def padded(value: Tensor, room: Tensor, groups: int = 1) -> Tensor:
    """A smaller tensor in the corner of zeros of the larger's shape. groups: of a convolution, each of which has its
    share of the first axis, and so its own corner."""
    if value.shape == room.shape:
        return value
    out = torch.zeros(room.shape, dtype=value.dtype, device=value.device)
    parts = value.unflatten(0, (groups, -1))
    out.unflatten(0, (groups, -1))[tuple(slice(n) for n in parts.shape)] = parts
    return out


def fit_config(tuner: Any, adapter: str) -> None:
    """The adapter's config as its padded tensors have it, so that what is saved loads again: the change stays."""
    layers = [(path, m) for path, m in tuner.adapted_layers() if adapter in m.entries]
    cfg = copy.copy(tuner.peft_config[adapter])
    ranks, alphas = {}, {}
    for path, m in layers:
        ranks[path] = r = m.view(adapter).lora_A.shape[0]
        alphas[path] = float(m.scaling[adapter]) * (r**0.5 if cfg.use_rslora else r)
    cfg.r, cfg.lora_alpha = max(ranks.values()), next(iter(alphas.values()))
    cfg.rank_pattern = {f"^{p}$": r for p, r in ranks.items() if r != cfg.r}
    cfg.alpha_pattern = {f"^{p}$": a for p, a in alphas.items() if a != cfg.lora_alpha}
    tuner.peft_config[adapter] = cfg
    for path, m in layers:
        entry = m.entries[adapter]
        entry.cfg = copy.copy(cfg.for_layer(path))  # each its own, as a compiled model notes which layers share one
        entry.specs = entry.method.tensors(entry.cfg, m.site)


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make LoRA adapters ready to be swapped in a compiled model: scalings become tensors, and with `target_rank` all
    ranks are padded with zeros to it, which changes no output. Call it before torch.compile.

    Raises ValueError where the model is compiled already (check_compiled), has no adapter, or has a larger rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
                "compile it again; call it before compiling.",
                stacklevel=2,
            )
    model = getattr(model, "_orig_mod", model)
    layers = [m for m in model.modules() if isinstance(m, Adapted) and m.entries]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    for m in layers:
        for name, entry in m.entries.items():
            if entry.method.name != "LORA" or m.site.kind == "parameter":
                continue
            if target_rank is not None:
                _pad(m, name, target_rank)
            now = m.scaling[name]
            if not isinstance(now, Tensor):
                m.scaling[name] = torch.tensor(float(now), device=m.site.device)  # type: ignore[assignment]
        m.changed()
    from .model import PeftModel

    tuner: Any = model.base_model if isinstance(model, PeftModel) else state.tuner_of(model)
    for name, cfg in tuner.peft_config.items():
        if registry.method_of(cfg).name == "LORA":
            fit_config(tuner, name)
    for m in layers:
        m.plan(m.site.dtype)  # found before compiling, so that the first call does not change what it depends on


def _pad(m: Adapted, adapter: str, rank: int) -> None:
    view = m.view(adapter)
    names = ("lora_embedding_A", "lora_embedding_B") if m.site.kind == "embedding" else ("lora_A", "lora_B")
    A, B = (getattr(view, n) for n in names)
    if A.shape[0] > rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({A.shape[0]}). "
            f"This is not possible. ({m.site!r})"
        )
    if rank % m.site.groups:
        raise ValueError(
            f"Trying to pad a {type(m.get_base_layer()).__name__} LoRA adapter with groups={m.site.groups} to target "
            f"rank {rank}, but the target rank is not divisible by {m.site.groups}. Please choose a target rank that "
            f"is divisible by {m.site.groups}. ({m.site!r})"
        )
    wide = A.new_empty(rank, *A.shape[1:]), B.new_empty(B.shape[0], rank // m.site.groups, *B.shape[2:])
    for t, room in zip((A, B), wide, strict=True):
        t.data = padded(t.data, room, m.site.groups)
