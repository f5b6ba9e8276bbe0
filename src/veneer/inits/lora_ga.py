"""LoRA-GA: A and B span the leading directions of the full gradient. Wang et al. 2024, arXiv:2407.05000, section 3.

    G = U S V^T, the weight's mean gradient;   A = V_r^T,   B = U_{r..2r} S_{r..2r}   ("ArB2r"),   W_base = W - s B A

scale: "stable" multiplies B by out^(1/4) / sqrt(gamma), "gd_scale" divides both by s, "weight_svd" gives B's first
column the length of the weight's largest singular value, "unit" leaves them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_tensors
from ..view import View
from . import matrix, split_base
from .prepared import Wanted, keep_start, note, take, wanted, write_cache

CACHE_KEY = "_peft_loraga_grad"  # as peft names it: cache files are the same


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Find the mean gradient of every target weight and leave it with its layer, for get_peft_model to use.

    model: the base, without adapters. train_step: runs forward and backward over some batches; it does no optimizer
    step. cache_file: read where it exists (train_step is not called then), written otherwise.

    Only target weights collect gradients meanwhile. Raises ValueError for a config of another kind, a target that
    got no gradient, or a cache of another model.
    """
    if str(lora_config.init_lora_weights).lower() != "lora_ga":
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            f"lora_ga_config=LoraGAConfig(...); it is {lora_config.init_lora_weights!r}"
        )
    layers = wanted(model, lora_config)
    if cache_file is not None and os.path.exists(cache_file):
        found = _read(cache_file, layers)
    else:
        with _gradients(model, layers) as sums:
            train_step()
        found = _means(sums)
        if cache_file is not None:
            write_cache(cache_file, {f"{name}.{CACHE_KEY}": g for name, g in found.items()})
    for w in layers:
        note(w.site.module, "lora_ga", found[w.name])


@contextmanager
def _gradients(model: nn.Module, layers: list[Wanted]) -> Iterator[dict[str, list[Any]]]:
    """Collect [sum, count] of each target's gradient as it comes; nothing else of the model takes gradients."""
    before = {p: p.requires_grad for p in model.parameters()}
    kept = {p: p.grad for p in model.parameters()}
    sums: dict[str, list[Any]] = {w.name: [None, 0] for w in layers}
    handles = []
    try:
        for p in before:
            p.requires_grad_(False)
        for w in layers:
            weight: Any = w.site.stored
            weight.requires_grad_(True)
            weight.grad = None
            handles.append(weight.register_post_accumulate_grad_hook(_collector(sums[w.name])))
        with _inputs_with_grad(model):
            yield sums
    finally:
        for h in handles:
            h.remove()
        for p, on in before.items():
            p.requires_grad_(on)
            p.grad = kept[p]


@contextmanager
def _inputs_with_grad(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing (its reentrant form) needs an input that carries gradients."""
    on = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    get = getattr(model, "get_input_embeddings", None)
    if not on or get is None:
        yield
        return
    handle = get().register_forward_hook(lambda m, args, y: y.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()


def _collector(total: list[Any]) -> Callable[[Tensor], None]:
    def collect(p: Tensor) -> None:
        g = p.grad
        assert g is not None
        total[0] = g.float() if total[0] is None else total[0].add_(g)
        total[1] += 1
        p.grad = None

    return collect


def _means(sums: dict[str, list[Any]]) -> dict[str, Tensor]:
    empty = [name for name, (total, _) in sums.items() if total is None]
    if empty:
        raise ValueError(
            f"no gradient reached {', '.join(empty[:5])}: train_step must call backward() on a loss that depends on "
            "every target layer"
        )
    return {name: total / count for name, (total, count) in sums.items()}


def _read(path: str, layers: list[Wanted]) -> dict[str, Tensor]:
    held, out = read_tensors(path, "cpu"), {}
    for w in layers:
        g = held.get(f"{w.name}.{CACHE_KEY}")
        if g is None or g.shape != w.site.stored.shape:
            said = "is missing" if g is None else f"is {tuple(g.shape)}, the weight {tuple(w.site.stored.shape)}"
            raise ValueError(f"{path}: the gradient of {w.name} {said}; delete the file to make it anew")
        out[w.name] = g
    return out


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> Tensor:
    W = weight()
    settings, r, M = cfg.lora_ga_config, cfg.r, matrix(W, p)
    if 2 * r > min(M.shape):
        raise ValueError(f"LoRA-GA takes 2 r = {2 * r} directions of a {tuple(M.shape)} gradient; lower r")
    G = p.site.to_canonical(take(p, "lora_ga", "preprocess_loraga")).to(M)
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if settings.direction == "ArBr":  # one takes the even, the other the odd directions
        of_A, of_B = torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    elif settings.direction == "random":
        of_A = of_B = torch.randperm(2 * r)[:r]
    else:
        of_A, of_B = (second, first) if settings.direction == "A2rBr" else (first, second)
    new_A, new_B = V.T[of_A], U[:, of_B] * S[of_B]
    if settings.scale == "stable":
        new_B = new_B * (M.shape[0] ** 0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "gd_scale":
        new_A, new_B = new_A / p.scaling, new_B / p.scaling
    elif settings.scale == "weight_svd":
        largest = torch.svd_lowrank(M, q=r, niter=4)[1][0]
        new_B = new_B * (largest / S[of_B[0]])
    new = split_base(A, B, new_A, new_B, W, p)
    keep_start(p)
    return new
