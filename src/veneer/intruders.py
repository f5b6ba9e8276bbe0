"""Fewer intruder dimensions: a LoRA adapter whose new directions, foreign to the base, are turned down. Shuttleworth
et al. 2024, arXiv:2410.21228, sections 3 and 5.

    W + delta = U S V^T;   i intrudes where |cos(u_i, u)| < epsilon for every left singular vector u of W
    delta' = best of rank r to   delta - (1 - lambda) sum of S_i u_i v_i^T over the intruders among the first k
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registry
from .errors import AdapterError
from .inits.prepared import tuner_in


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] = print,
) -> dict[str, int]:
    """Add adapter `new_adapter_name`, make it active, and return the number of intruders of each layer.

    top_k: how many leading directions are looked at. threshold_epsilon: below which cosine a direction is new.
    mitigation_lambda: what is left of an intruder, 1 for all of it. logging_sink gets a line a layer. Layers other
    than linear ones keep their factors.

    Raises ValueError for settings out of range, and adapters that are not plain LoRA on the base's own weights.
    """
    _check(top_k, threshold_epsilon, mitigation_lambda)
    tuner = _tuner_with(peft_model, old_adapter_name)
    tuner.add_adapter(new_adapter_name, _config_for_new(tuner.peft_config[old_adapter_name]))
    found = {}
    for name, layer in tuner.adapted_layers():
        if old_adapter_name not in layer.entries:
            continue
        _copy(layer, old_adapter_name, new_adapter_name)
        if layer.site.kind != "linear":
            continue
        W, delta = layer.site.weight().detach().float(), layer.delta(old_adapter_name).float()
        reduced, found[name] = reduce(W, delta, top_k, threshold_epsilon, mitigation_lambda)
        logging_sink(f"{name}: Intruders: {found[name]}")
        if found[name] and layer.scaling[new_adapter_name]:
            _factor(reduced, layer, new_adapter_name)
    tuner.set_adapter(new_adapter_name)
    logging_sink(f"Enabling new adapter {new_adapter_name}")
    return found


def _tuner_with(peft_model: Any, adapter: str) -> Any:
    """The model's tuner; AdapterError where the adapter is not a plain LoRA over the base's own weights."""
    tuner = tuner_in(peft_model)
    if tuner is None:
        raise AdapterError(f"{type(peft_model).__name__} holds no adapters on layers")
    tuner.known(adapter)
    cfg = tuner.peft_config[adapter]
    method: Any = registry.method_of(cfg)
    if method.name != "LORA" or method.changes_base(cfg):
        what = method.name if method.name != "LORA" else f"init_lora_weights={cfg.init_lora_weights!r}"
        raise AdapterError(
            f"adapter {adapter!r} ({what}) cannot be reduced: this works for plain LoRA over the base's own "
            "weights; save_as_lora makes one of other adapters"
        )
    return tuner


def _copy(layer: Any, old_adapter: str, new_adapter: str) -> None:
    old, new = layer.view(old_adapter), layer.view(new_adapter)
    for key in old.where:
        new.fill(key, getattr(old, key).detach())
    layer.scaling[new_adapter] = layer.scaling[old_adapter]


def _factor(delta: Tensor, layer: Any, adapter: str) -> None:
    """The adapter's factors: the best approximation of delta (out, inp) that its rank allows."""
    p = layer.view(adapter)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    p.fill("lora_A", Vh[: p.cfg.r])
    p.fill("lora_B", U[:, : p.cfg.r] * (S[: p.cfg.r] / layer.scaling[adapter]))


def reduce(W: Tensor, delta: Tensor, k: int, epsilon: float, keep: float) -> tuple[Tensor, int]:
    """(delta with its intruders turned down, their number) for one matrix (out, inp)."""
    own = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + delta, full_matrices=False)
    nearest = (own.mT @ U[:, :k]).abs().amax(0)
    new = (nearest < epsilon).nonzero().flatten()
    if not len(new):
        return delta, 0
    return delta - (1 - keep) * (U[:, new] * S[new]) @ Vh[new], len(new)


def _config_for_new(cfg: Any) -> Any:
    out = copy.deepcopy(cfg)
    out.init_lora_weights = True
    return out


def _check(top_k: int, epsilon: float, keep: float) -> None:
    if top_k < 1:
        raise AdapterError(f"top_k={top_k}: must be at least 1")
    if not epsilon >= 0:
        raise AdapterError(f"threshold_epsilon={epsilon}: a cosine, from 0 (above 1 every direction is new)")
    if not 0 <= keep <= 1:
        raise AdapterError(f"mitigation_lambda={keep}: a share, from 0 to 1")
