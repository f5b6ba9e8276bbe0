"""Arrow: routes each token to the LoRA adapters whose direction it lies along, without training. Ostapenko et al. 2024,
arXiv:2405.11157, section 3.3. GenKnowSub (2025, arXiv:2505.10939, section 3) takes general knowledge out of them first.

    y = W x + sum_i w_i s_i B_i A_i x,   w = softmax(top_k |v_i . x| / T),   v_i: B_i A_i's first right singular vector

    lora_A.weight (r, inp), lora_B.weight (out, r)    kept for files, unused: the tensors are the task adapters' own

With use_gks, A_i and B_i are taken less the mean over the general adapters, at each use: the adapters stay as they are.
Reached by LoraConfig(arrow_config=ArrowConfig(...)), or made whole by `create_arrow_model`. Needs its task adapters on
the same model; does not merge, since the routing depends on the token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AdapterError
from ..kinds import Routed, Spec
from ..site import Site
from ..view import View
from .lora import LoraConfig, lora_check, lora_factors, lora_tensors
from .lora_options import ArrowConfig

ROUTER = "arrow_router"


class Arrow(Routed):
    Config = LoraConfig
    prefix = "lora_"
    dropout = "lora_dropout"
    needs_others = True

    def cannot_merge(self, site: Site) -> str:
        return f"Cannot merge an active Arrow router adapter: what it does on {site!r} depends on the input"

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {k: replace(spec, train=False) for k, spec in lora_tensors(cfg, site).items()}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in p.where:
            p.fill(key, torch.zeros_like(getattr(p, key)))
        return None

    def side(self, p: View, x: Tensor) -> Tensor:
        A, B, directions, scales = experts(p)
        arrow = p.cfg.arrow_config
        like = F.linear(x, directions).abs()
        top, at = like.topk(arrow.top_k, -1)
        w = torch.zeros_like(like).scatter(-1, at, torch.softmax(top / arrow.router_temperature, -1))
        h = F.linear(x, A).unflatten(-1, (len(directions), -1)) * (w * scales)[..., None]
        return F.linear(h.flatten(-2), B)


def experts(p: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The task adapters' A one under the other (n * r, inp), B side by side (out, n * r), directions (n, inp) and
    scalings (n,), in the view's dtype. Found again when one of their tensors changes."""
    arrow = p.cfg.arrow_config
    tasks = [_other(p, name) for name in (*(arrow.task_adapter_names or ()), *_later(p))]
    if not 0 < arrow.top_k <= len(tasks):
        raise AdapterError(
            f"Arrow on {p.site!r}: top_k={arrow.top_k} with {len(tasks)} task adapters; top_k is at most their number"
        )
    general = [_other(p, name) for name in (arrow.gks_adapter_names or []) if arrow.use_gks]
    used = [t for v in (*tasks, *general) for t in lora_factors(v)]
    key = (p.dtype, *((id(t), t._version, t.data_ptr()) for t in used), *(v.scaling for v in tasks))
    held = p.memory
    if held.get("key") != key or any(t.requires_grad for t in used):
        held.update(key=key, made=_made(p, tasks, general))
    return held["made"]


def _later(p: View) -> list[str]:
    """LoRA adapters that were loaded beside the router's own: they are experts, too."""
    arrow = p.cfg.arrow_config
    known = {*(arrow.task_adapter_names or ()), *(arrow.gks_adapter_names or ())}
    plain = {n for n, e in p.layer.entries.items() if e.method.name == "LORA"}
    return [n for n in p.layer.entries if n in plain - known]


def _other(p: View, name: str) -> View:
    if name not in p.layer.entries:
        raise AdapterError(
            f"Arrow on {p.site!r} routes to adapter {name!r}, which this layer does not have; load it under that name "
            "first, on the same layers as the router"
        )
    return p.layer.view(name)


def _made(p: View, tasks: Sequence[View], general: Sequence[View]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = [lora_factors(v) for v in tasks]
    if general:
        B0 = torch.stack([lora_factors(v)[0] for v in general]).mean(0)
        A0 = torch.stack([lora_factors(v)[1] for v in general]).mean(0)
        pairs = [(B - B0, A - A0) for B, A in pairs]
    with torch.no_grad():
        directions = torch.stack([_direction(B, A) for B, A in pairs])
    A, B = torch.cat([A for _, A in pairs]), torch.cat([B for B, _ in pairs], 1)
    scales = torch.tensor([v.scaling for v in tasks], device=A.device)
    made = (A, B, directions, scales)
    return made if p.dtype is None else tuple(t.to(p.dtype) for t in made)  # type: ignore[return-value]


def _direction(B: Tensor, A: Tensor) -> Tensor:
    """First right singular vector of B A, (inp,), by way of matrices of rank size."""
    wide = torch.promote_types(A.dtype, torch.float32)
    small = torch.linalg.qr(B.to(wide))[1] @ A.to(wide)
    return torch.linalg.svd(small, full_matrices=False)[2][0].to(A.dtype)


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """A PeftModel that routes between saved LoRA adapters: "task_0", ..., with use_gks also "gks_0", ..., and the
    active "arrow_router".

    Raises ValueError where no path is given, or adapters differ in method, rank or target modules, TypeError where
    they are on other layers than linear ones.
    """
    from ..model import PeftModel

    paths = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    if not paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("You should provide general LoRA paths if you want to use GenKnowSub.")
    tasks = list(paths)
    general = {f"gks_{i}": path for i, path in enumerate(general_adapter_paths or [])} if arrow_config.use_gks else {}
    model = None
    for name, path in {**paths, **general}.items():
        if model is None:
            model = PeftModel.from_pretrained(base_model, path, adapter_name=name, **adapter_kwargs)
        else:
            model.load_adapter(path, name, **adapter_kwargs)
        _alike(model.peft_config, name)
    assert model is not None
    for path, layer in model.base_model.adapted_layers():
        if layer.site.kind != "linear":
            raise TypeError(
                f"LoRA adapters must only target Linear layers, whose directions Arrow compares: {path} is "
                f"{type(layer.get_base_layer()).__name__}"
            )
    first = model.peft_config[tasks[0]]
    routing = replace(arrow_config, task_adapter_names=tasks, gks_adapter_names=list(general))
    if routing.top_k > len(tasks):
        raise ValueError(f"top_k={routing.top_k} with {len(tasks)} task adapters; top_k is at most their number")
    router = LoraConfig(
        r=first.r, lora_alpha=first.lora_alpha, use_rslora=first.use_rslora, arrow_config=routing,
        target_modules=first.target_modules, exclude_modules=first.exclude_modules,
        layers_to_transform=first.layers_to_transform, layers_pattern=first.layers_pattern,
        rank_pattern=dict(first.rank_pattern or {}), alpha_pattern=dict(first.alpha_pattern or {}),
    )  # fmt: skip
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model.eval()


def _alike(configs: dict[str, Any], name: str) -> None:
    first, this = next(iter(configs.values())), configs[name]
    kinds = [str(getattr(c.peft_type, "value", c.peft_type)) for c in (first, this)]
    if kinds[0] != kinds[1] or kinds[0] != "LORA":
        raise ValueError(f"Cannot combine adapters with different peft types: Arrow takes LoRA, {name} is {kinds[1]}")
    if this.r != first.r:
        raise ValueError(f"[{name}] rank mismatch: {this.r} != {first.r}")
    if this.target_modules != first.target_modules:
        raise ValueError(f"[{name}] target_modules mismatch: {this.target_modules} != {first.target_modules}")
    if this.use_dora:
        raise ValueError(f"[{name}] use_dora=True: Arrow adds low-rank changes, which a DoRA adapter is not")
