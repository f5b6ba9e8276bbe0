"""CorDA: the weight's directions as the task's inputs see them. Yang et al. 2024, arXiv:2406.05223, section 3.

    C = mean of x^T x;   W C = U S V^T;   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) (V^T C^-1)_r,   W_base = W - s B A

r are the leading directions ("ipm") or the least ("kpm"). Each batch's inputs are divided by their largest value; C
gets a hundredth of its mean diagonal added, doubled until its inverse is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_tensors
from ..view import View
from . import split_base
from .prepared import Wanted, keep_start, note, progress, take, wanted, write_cache

PARTS = ("U_WC", "S_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Find each target's directions and leave them with its layer, for get_peft_model to use.

    model: the base, without adapters. run_model: runs the model over some batches; not called where the config's
    covariance_file or cache_file is there. hooked_model: the module whose layers run_model calls, where it is not
    `model` (a wrapper of it).

    Raises ValueError for a config of another kind, a target that saw no input, or inputs that are not finite.
    """
    if str(lora_config.init_lora_weights).lower() != "corda":
        raise ValueError(
            f"preprocess_corda needs init_lora_weights='corda', not {lora_config.init_lora_weights!r}: set it and "
            "corda_config=CordaConfig(...)"
        )
    cfg = lora_config.corda_config
    layers = wanted(model, lora_config)
    if cfg.cache_file is not None and os.path.exists(cfg.cache_file):
        found = _cached(cfg.cache_file, layers)
    else:
        covariances = _covariances(model, layers, cfg, run_model, hooked_model)
        found = {}
        for w in progress(layers, "CorDA: directions", show_progress_bar):
            found[w.name] = directions(w, covariances[w.name], cfg.corda_method)
            if cfg.prune_temporary_fields:
                del covariances[w.name]
        if cfg.cache_file is not None:
            write_cache(cfg.cache_file, {f"{n}.eigens.{k}": t for n, f in found.items() for k, t in f.items()})
    for w in layers:
        note(w.site.module, "corda", found[w.name])


def directions(w: Wanted, C: Tensor, method: str) -> dict[str, Tensor]:
    """U_WC (out, r), S_WC (r,), V_WC (inp, r) of one layer from its inputs' covariance (inp, inp)."""
    W = w.site.weight().float()
    C = C.to(W.device).float()
    r = w.cfg.r
    if r > min(W.shape):
        raise ValueError(f"r={r} is more than the rank of {w.site!r}")
    eye = torch.eye(len(C), device=C.device)
    damp = 0.01 * C.diagonal().mean()
    if not damp > 0:
        raise ValueError(f"CorDA: every input of {w.site!r} was zero")
    while True:
        full = C + damp * eye
        inverse = torch.linalg.inv(full)
        if torch.dist(full @ inverse, eye) < 0.05:
            break
        damp = damp * 2
    U, S, Vh = torch.linalg.svd(W @ full, full_matrices=False)
    VC = Vh @ inverse
    part = slice(0, r) if method == "ipm" else slice(len(S) - r, None)
    found = {"U_WC": U[:, part], "S_WC": S[part], "V_WC": VC[part].T}
    if not all(bool(torch.isfinite(t).all()) for t in found.values()):
        raise ValueError(f"CorDA: the directions of {w.site!r} are not finite; its inputs or weight hold NaN")
    return found


def _covariances(
    model: nn.Module, layers: list[Wanted], cfg: Any, run_model: Callable[[], None] | None, hooked: nn.Module | None
) -> dict[str, Tensor]:
    path = cfg.covariance_file
    if path is not None and os.path.exists(path):
        held = read_tensors(path, "cpu")
        for w in layers:
            if w.name not in held or held[w.name].shape != (w.site.inp, w.site.inp):
                raise ValueError(f"{path}: no covariance of {w.site!r} is in it; delete the file to make it anew")
        if cfg.verbose:
            print(f"CorDA: covariances read from {path}")
        return {w.name: held[w.name] for w in layers}
    if run_model is None:
        raise ValueError("preprocess_corda needs run_model: a function that runs the model over some batches")
    out = collect(hooked if hooked is not None else model, layers, run_model, half=cfg.use_float16_for_covariance)
    if path is not None:
        write_cache(path, out)
        if cfg.verbose:
            print(f"CorDA: covariances written to {path}")
    return out


def collect(
    model: nn.Module, layers: list[Wanted], run_model: Callable[[], None], *, half: bool = False
) -> dict[str, Tensor]:
    """Mean of x^T x for each layer over the batches that run_model passes."""
    sums: dict[str, list[Any]] = {w.name: [None, 0] for w in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            x = (x.half() if half else x.float()) / x.max().abs()
            C = x.T @ x
            if not torch.isfinite(C).all():
                raise ValueError(f"CorDA: the inputs of {name} are not finite, or overflow in {x.dtype}")
            total = sums[name]
            total[0] = C if total[0] is None else total[0].add_(C)
            total[1] += 1

        return see

    handles = [model.get_submodule(w.name).register_forward_pre_hook(hook(w.name)) for w in layers]
    try:
        run_model()
    finally:
        for h in handles:
            h.remove()
    unseen = [name for name, (total, _) in sums.items() if total is None]
    if unseen:
        raise ValueError(f"CorDA: run_model passed nothing through {', '.join(unseen[:5])}")
    return {name: total / count for name, (total, count) in sums.items()}


def _cached(path: str, layers: list[Wanted]) -> dict[str, dict[str, Tensor]]:
    held, out = read_tensors(path, "cpu"), {}
    for w in layers:
        shapes = {"U_WC": (w.site.out, w.cfg.r), "S_WC": (w.cfg.r,), "V_WC": (w.site.inp, w.cfg.r)}
        own = {k: held.get(f"{w.name}.eigens.{k}") for k in PARTS}
        if any(t is None or tuple(t.shape) != shapes[k] for k, t in own.items()):
            raise ValueError(f"{path}: it holds no directions of rank {w.cfg.r} for {w.site!r}; delete it")
        out[w.name] = own
    return out  # type: ignore[return-value]


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> Tensor:
    W = weight()
    if not W.is_floating_point():
        raise ValueError(f"CorDA needs a floating point weight, not {W.dtype}")
    found = take(p, "corda", "preprocess_corda")
    U, S, V = (found[k].to(W.device) for k in PARTS)
    root = (S / p.scaling).sqrt()
    new = split_base(A, B, root[:, None] * V.T, U * root, W, p)
    keep_start(p)
    return new
