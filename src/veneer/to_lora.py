"""Any adapter that has a delta, as a LoRA adapter: the best approximation of a given rank, layer by layer.

W' - W = U S V^T;   B = U_r S_r,   A = V_r^T   (Eckart and Young 1936: no other rank r is closer)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import registry, state
from .errors import AdapterError, CannotConvert, PeftWarning
from .files import SAFE_NAME, write_tensors
from .inits.prepared import pattern_key, progress, tuner_in
from .inject import candidates, find
from .kinds import Replace
from .view import attribute

if TYPE_CHECKING:
    from .layer import Adapted
    from .methods.lora import LoraConfig
    from .tuner import Tuner

ROOT = "base_model.model."


class Converted(tuple):
    """(config, tensors under their file keys). errors: layer -> ||delta - s B A|| / ||delta||, Frobenius; where the
    delta is zero it is zero."""

    errors: dict[str, float]

    def __new__(cls, config: LoraConfig, tensors: dict[str, Tensor], errors: dict[str, float]) -> Converted:
        made = super().__new__(cls, (config, tensors))
        made.errors = errors
        return made

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> Converted:
    """A LoRA config and its tensors that do what adapter `adapter_name` does, up to the rank; unpacks to the two.

    rank: an integer, the rank of every layer; or a number in (0, 1], the share of each delta's energy (its squared
    singular values) to keep, with ranks to match. A change of the bias becomes lora_bias, modules_to_save are
    copied. compile_kwargs: compile the decomposition with these arguments for torch.compile.

    The tensors have the dtype of the adapter's own. `errors` of the result says for each layer how far it is from the
    adapter. The model stays as it is. Raises ValueError for a rank that does not fit, CannotConvert (a TypeError) for
    adapters that no LoRA can stand in for, with the reason.
    """
    tuner = _tuner(model, adapter_name)
    _check_rank(rank)
    layers = _layers(tuner, adapter_name)
    if str(tuner.peft_config[adapter_name].peft_type.value) == "LORA":
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter: that only serves to change its rank",
            PeftWarning,
            stacklevel=2,
        )
    decompose: Callable[[Tensor], Any] = lambda D: torch.linalg.svd(D, full_matrices=False)
    if compile_kwargs is not None:
        decompose = torch.compile(decompose, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    changes = {name: _change(layer, adapter_name) for name, layer in layers.items()}
    lora_bias = any(b is not None for _, b in changes.values())
    for name in progress(layers, "Converting to LoRA", progressbar):
        layer, (delta, bias) = layers[name], changes.pop(name)
        U, S, Vh = decompose(delta.flatten(1))
        r = ranks[name] = _rank(rank, S, layer)
        norm = float(S.norm())
        errors[name] = float(S[r:].norm()) / norm if norm else 0.0
        found = _tensors(name, layer, Vh[:r], U[:, :r] * S[:r])
        if lora_bias:
            found[f"{ROOT}{name}.lora_B.bias"] = (torch.zeros(layer.site.out) if bias is None else bias).contiguous()
        dtype = _stored_dtype(layer, adapter_name)
        tensors |= {k: t.to(dtype) for k, t in found.items()}
    prefix = ROOT
    tensors |= {p.key: p.get().detach().clone() for p in state.module_places(tuner.model, adapter_name, prefix)}
    return Converted(_config(tuner, adapter_name, ranks, rank, lora_bias), tensors, errors)


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> Converted:
    """convert_to_lora, written into a folder as an adapter that veneer and peft load; returns what it wrote."""
    done = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config, tensors = done
    folder = os.fspath(path)
    if os.path.isfile(folder):
        raise AdapterError(f"save_as_lora needs a folder, and {folder} is a file")
    write_tensors(os.path.join(folder, SAFE_NAME), tensors)
    config.save_pretrained(folder)
    return done


def _tuner(model: nn.Module, adapter: str) -> Tuner:
    tuner = tuner_in(model)
    if tuner is None:
        raise CannotConvert(
            f"Could not detect any layer that supports LoRA conversion: {type(model).__name__} holds no adapters on "
            "layers (prompt methods add tokens and have no delta)"
        )
    tuner.known(adapter)
    return tuner


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise AdapterError(f"rank={rank!r}: an integer, or a share of the energy in (0, 1]")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise AdapterError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank} (the "
            "share of the energy to keep)"
        )
    if isinstance(rank, int) and rank < 1:
        raise AdapterError(f"Passing a rank of {rank} doesn't make sense, it must be at least 1")


def convertible(tuner: Tuner, adapter: str) -> bool:
    """Whether each of the adapter's layers can be a LoRA layer."""
    tuner.known(adapter)
    return not _why_not(tuner, adapter, _of(tuner, adapter))


def _of(tuner: Tuner, adapter: str) -> dict[str, Adapted]:
    return {n: x for n, x in tuner.adapted_layers() if adapter in x.entries}


def _layers(tuner: Tuner, adapter: str) -> dict[str, Adapted]:
    """The adapter's layers; raises where one of them cannot be a LoRA layer."""
    layers = _of(tuner, adapter)
    why = _why_not(tuner, adapter, layers)
    if why:
        kind = AdapterError if _trains_biases(tuner, adapter) else CannotConvert
        raise kind(f"adapter {adapter!r} cannot be converted to LoRA: {why}")
    return layers


def _trains_biases(tuner: Tuner, adapter: str) -> bool:
    return getattr(tuner.peft_config[adapter], "bias", "none") not in ("none", None)


def _why_not(tuner: Tuner, adapter: str, layers: dict[str, Adapted]) -> str:
    cfg = tuner.peft_config[adapter]
    why = ""
    if _trains_biases(tuner, adapter):
        why = (
            f"The adapter's config sets bias={cfg.bias}, this is not supported right now: it trains biases of the base "
            "itself, which a LoRA file for this base would lose"
        )
    elif getattr(cfg, "trainable_token_indices", None):
        why = "trainable_token_indices replaces rows of the embedding; set it again for the new adapter"
    method: Any = registry.method_of(cfg)
    if isinstance(method, Replace):
        why = f"{method.name} trains whole modules and has no delta"
    elif not method.mergeable:
        why = f"{method.name} depends on the input and has no delta"
    if method.changes_base(cfg) and any(x.entries[adapter].start is None for x in layers.values()):
        why = why or (
            f"{method.name} changed the base's weights when it was made, and what they were is not known any more; "
            "for PiSSA and OLoRA save with path_initial_model_for_weight_conversion instead"
        )
    for name, layer in layers.items():
        site = layer.site
        if site.kind not in ("linear", "conv", "embedding") or site.experts > 1:
            why = why or f"{name} is a layer of kind {site.kind!r}, for which there is no conversion"
        elif site.groups > 1:
            why = why or f"{name} has {site.groups} groups, and LoRA's A would read every channel of it"
        elif layer.merged_adapters:
            why = why or f"adapters are merged into {name}; call unmerge_adapter() first"
    return why


def _change(layer: Adapted, adapter: str) -> tuple[Tensor, Tensor | None]:
    """What the adapter does to weight and bias, float32; the bias None where it stays.

    The base that data changed (CorDA, LoRA-GA) counts as what it was, since the file will meet that one.
    """
    W, b = layer.site.weight().detach(), layer.site.bias()
    new, new_b = layer.merged_weights([adapter])
    delta = new.float() - W.float()
    start = layer.entries[adapter].start
    if start is not None:
        A, B = start
        delta = delta - layer.scaling[adapter] * layer.site.compose(B.float(), A.float()).to(delta.device)
    if new_b is None:
        return delta, None
    bias = new_b.float() if b is None else new_b.float() - b.detach().float()
    return delta, bias if bool(bias.any()) else None


def _stored_dtype(layer: Adapted, adapter: str) -> torch.dtype:
    """Of the adapter's trained tensors on a layer; float32 where all are shared with other layers."""
    entry = layer.entries[adapter]
    held = (getattr(*entry.where[attribute(k)]) for k, spec in entry.specs.items() if spec.train)
    return next((t.dtype for t in held if t.is_floating_point()), torch.float32)


def _rank(rank: int | float, S: Tensor, layer: Adapted) -> int:
    if isinstance(rank, int):
        if rank > len(S):
            raise AdapterError(
                f"The chosen rank {rank} is larger than the weight shape ({len(S)}), please choose a lower rank, or a "
                f"share of the energy such as 0.99 (on {layer.site!r})"
            )
        return rank
    energy = S.double().square().cumsum(0)
    if not energy[-1] > 0:
        return 1
    return min(int((energy < rank * energy[-1]).sum()) + 1, len(S))


def _tensors(name: str, layer: Adapted, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    site, r = layer.site, len(A)
    if site.kind == "embedding":
        keys = "lora_embedding_A", "lora_embedding_B"
    else:
        keys = "lora_A.weight", "lora_B.weight"
        A = A.reshape(r, site.inp, *site.kernel)
        B = B.reshape(site.out, r, *(1 for _ in site.kernel))
    return {f"{ROOT}{name}.{key}": t.contiguous() for key, t in zip(keys, (A, B), strict=True)}


def _config(tuner: Tuner, adapter: str, ranks: dict[str, int], rank: int | float, lora_bias: bool) -> LoraConfig:
    """lora_alpha = r on every layer, so that the scaling is 1; the source's choice of layers where it means the same
    ones to LoRA."""
    from .methods.lora import LoraConfig

    source = tuner.peft_config[adapter]
    r = rank if isinstance(rank, int) else 1
    odd = {pattern_key(n, ranks): k for n, k in ranks.items() if k != r or isinstance(rank, float)}
    common: dict[str, Any] = {
        k: getattr(source, k) for k in ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    }
    common |= {
        "modules_to_save": getattr(source, "modules_to_save", None),
        "lora_bias": lora_bias,
        "r": r,
        "lora_alpha": r,
    }
    common |= {"rank_pattern": odd, "alpha_pattern": dict(odd)}
    chosen = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers")
    selection: dict[str, Any] = {k: getattr(source, k, None) for k in chosen}
    made = LoraConfig(**common, **selection)
    method: Any = registry.method_of(made)
    if made.target_modules and {m.name for m in find(tuner, made, method)} == set(ranks):
        return made
    paths = list(ranks)
    ends = tuple("." + p for p in paths)
    if any(path.endswith(ends) for path, _ in candidates(tuner.model)):
        import re

        return LoraConfig(**common, target_modules="|".join(map(re.escape, paths)))
    return LoraConfig(**common, target_modules=paths)
