"""add_weighted_adapter: a new LoRA adapter from a weighted sum of others.

"cat" is exact: it stacks the factors, and the rank is the sum of the ranks. "svd" is the best approximation
of a given rank, found without forming a delta. "linear" adds A's and B's apart, which is cheap and inexact:
(A1 + A2, B1 + B2) also multiplies B1 with A2. The others prune before they add: "ties", "dare_linear",
"dare_ties", "magnitude_prune" on the factors, and with "_svd" on the deltas.

The result is a plain LoRA adapter with scaling 1 on every layer, so that its file says all of it. How far it
is from the exact weighted sum is reported for each layer.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .combine_checks import check_saved_modules, check_settings, refuse
from .combine_layers import Job, combine_layers
from .combine_math import Settings
from .errors import AdapterError, PeftWarning

if TYPE_CHECKING:
    from .tuner import Tuner


# Settings of the first adapter that the result keeps; everything else is LoraConfig's default.
KEPT = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "fan_in_fan_out", "lora_dropout",
        "layer_replication", "alora_invocation_tokens")  # fmt: skip
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers")


@dataclass(frozen=True)
class Combined:
    """What was made. errors: layer -> distance to the exact weighted sum of the deltas, relative to its norm
    (0 for "cat", up to rounding; for the pruning types it measures what pruning took away)."""

    adapter: str
    combination_type: str
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def add_weighted_adapter(
    tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None, svd_clamp: float | None = None, svd_full_matrices: bool = True,
    svd_driver: str | None = None, density: float | None = None, majority_sign_method: str = "total",
    svd_error: float | None = None,
) -> Combined:  # fmt: skip
    """Add adapter `adapter_name`, the weighted sum of LoRA adapters; it is not made active.

    weights: one number an adapter, of either sign. combination_type: see the module. svd_rank: rank of the
    "svd" types, by default the largest on the layer. svd_error: for "svd", each layer's smallest rank that is off
    by no more than this share of the sum's norm. svd_clamp: a quantile in (0, 1] at which the SVD's
    factors are cut. svd_full_matrices changes nothing (the leading vectors are the same). svd_driver: for SVD
    on CUDA. density: the share of entries that the pruning types keep, in (0, 1]. majority_sign_method:
    "total" or "frequency".

    Adapters may have different ranks, alphas, patterns and layers ("cat" and the "svd" types; the others need
    one rank a layer). A module in modules_to_save that one of them holds is copied as it is.

    Raises ValueError for names, weights and settings that do not fit, and for adapters whose weighted sum no
    LoRA adapter can hold or no file describe (DoRA, trained base biases, PiSSA's changed base, trained
    tokens, ...). Nothing is added then.
    """
    settings = Settings(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method, svd_error)
    names, numbers = tuner.known(adapters), [float(w) for w in weights]
    check_settings(settings, names, numbers)
    for name in names:
        refuse(tuner, name)
    check_saved_modules(tuner, names)
    tuner.check_new(adapter_name, tuner.peft_config[names[0]])
    lora_bias = any(tuner.peft_config[n].lora_bias for n in names)
    if lora_bias and combination_type not in ("cat", "svd", "linear"):
        raise AdapterError(
            f"{combination_type!r} says nothing of lora_bias; use 'cat', 'svd' or 'linear' for these adapters"
        )
    job = Job(tuner, names, numbers, settings, lora_bias)
    layers = [(path, layer) for path, layer in tuner.adapted_layers() if any(n in layer.entries for n in names)]
    job.new = combine_layers(job, layers)
    cfg = _config(job)
    _write(job, adapter_name, cfg)
    done = Combined(adapter_name, combination_type, {path: new.error for path, new in job.new.items()})
    _warn_if_far(done)
    return done


# -- the result ----------------------------------------------------------------------------------------------
def _config(job: Job) -> Any:
    """The result's config: lora_alpha = r on each layer, without rsLoRA, so that the scaling is 1."""
    configs = [job.tuner.peft_config[n] for n in job.adapters]
    first = configs[0]
    if any(c.get("layer_replication") != first.get("layer_replication") for c in configs):
        raise AdapterError("these adapters differ in layer_replication; they belong to models of different depth")
    if any(c.get("alora_invocation_tokens") != first.get("alora_invocation_tokens") for c in configs):
        raise AdapterError(
            "these adapters act on different tokens (alora_invocation_tokens), and one adapter has one invocation; "
            "combine adapters with the same"
        )
    ranks = Counter(new.rank for new in job.new.values())
    r = max(ranks, key=lambda k: (ranks[k], k))
    pattern = {f"^{re.escape(path)}": new.rank for path, new in job.new.items() if new.rank != r}
    saved = [
        m
        for c in configs
        for m in ([c.modules_to_save] if isinstance(c.modules_to_save, str) else c.modules_to_save or [])
    ]
    known = type(first).__dataclass_fields__
    return type(first)(
        **{k: getattr(first, k) for k in KEPT if k in known},
        **_selection(job, configs),
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_bias=job.lora_bias,
        modules_to_save=list(dict.fromkeys(saved)) or None,
    )


def _selection(job: Job, configs: list[Any]) -> dict[str, Any]:
    """The first adapter's choice of layers where all agree; else the layers' full names."""
    first = {k: getattr(configs[0], k) for k in SELECTION}
    if all(getattr(c, k) == v for c in configs[1:] for k, v in first.items()):
        return first
    from .inject import candidates

    paths = list(job.new)
    ends = tuple("." + p for p in paths)
    ambiguous = any(path.endswith(ends) for path, _ in candidates(job.tuner.model))
    return {"target_modules": "|".join(map(re.escape, paths)) if ambiguous else paths}


def _write(job: Job, adapter_name: str, cfg: Any) -> None:
    tuner = job.tuner
    tuner.add_adapter(adapter_name, cfg, fill=False)
    try:
        _fill(job, adapter_name)
    except AdapterError:
        tuner.delete_adapter(adapter_name)
        raise
    for _, wrapper in tuner.saved_modules():
        holder = next((n for n in job.adapters if n in wrapper.modules_to_save), None)
        if holder is not None and adapter_name in wrapper.modules_to_save:
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[holder].state_dict())


def _fill(job: Job, adapter_name: str) -> None:
    made = {path: layer for path, layer in job.tuner.adapted_layers() if adapter_name in layer.entries}
    if made.keys() != job.new.keys():
        odd = sorted(made.keys() ^ job.new.keys())
        raise AdapterError(f"the result's config would adapt other layers than its sources: {', '.join(odd[:5])}")
    for path, layer in made.items():
        new, view, embedding = job.new[path], layer.view(adapter_name), layer.site.kind == "embedding"
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for key, value in zip(keys, (new.A, new.B), strict=True):
            place = getattr(view, key)
            if place.numel() != value.numel():
                raise AdapterError(f"{path}: the result's {key} has rank {new.rank}, its place {tuple(place.shape)}")
            view.fill(key, value.flatten(0, 1).reshape(place.shape))
        if new.bias is not None:
            view.fill("lora_B_bias", new.bias)


def _warn_if_far(done: Combined) -> None:
    if done.combination_type == "linear" and done.worst > 0.01:
        layer = max(done.errors, key=lambda k: done.errors[k])
        warnings.warn(
            "combination_type='linear' adds A and B apart, which also multiplies one adapter's B with "
            f"another's A: on {layer} the result is off by {done.worst:.0%} of the weighted sum. 'cat' is "
            "exact, 'svd' the best of a given rank.",
            PeftWarning,
            stacklevel=4,
        )
