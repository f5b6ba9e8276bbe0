"""A LoRA adapter from two full models: per layer, the best approximation of W_tuned - W_base of a given rank.

W1 - W0 = U S V^T;   B = U_r S_r,   A = V_r^T   (Eckart and Young 1936)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..combine_math import split
from ..errors import AdapterError
from ..methods.lora import LoRA, LoraConfig
from ..site import Site, site_of
from .folders import Result, check_new, write_folder

__all__ = ["Extraction", "extract_lora"]

ROOT = "base_model.model."


@dataclass(frozen=True)
class Extraction(Result):
    """whole: modules that differ and that no LoRA layer can hold, saved whole; left: parameters left out."""

    whole: list[str]
    left: list[str]


@torch.no_grad()
def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    out: str | Path,
    rank: int | None = None,
    error: float | None = None,
    *,
    task_type: str | None = None,
    save_whole: bool = True,
) -> Extraction:
    """Write a LoRA adapter that takes `base` towards `tuned`; both models stay as they are.

    rank: of every changed layer (at most); or error: each layer's smallest rank that is off by no more than this
    share of its change. Changed biases of such layers become lora_bias; changed modules of other kinds (norms) go
    into modules_to_save, or with save_whole=False are left out and listed. Raises AdapterError where the models
    differ in structure or not at all.
    """
    if (rank is None) == (error is None):
        raise AdapterError("give the rank, or the error to allow: one of the two")
    path = check_new(out)
    pairs = _pairs(base, tuned)
    sites = _sites(base, pairs)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    biased = any("bias" in pairs[n] for n in sites)
    for name, site in sites.items():
        if site.groups > 1 or (biased and site.kind == "embedding"):
            continue
        errors[name], ranks[name], made = _layer(site, name, pairs.pop(name), rank, error, biased)
        tensors |= made
    whole, left = _rest(base, tuned, pairs, save_whole, tensors)
    if not tensors:
        raise AdapterError("the two models are equal: there is nothing to extract")
    if not ranks:
        raise AdapterError(f"no layer that LoRA can adapt differs, only {', '.join([*whole, *left][:5])}")
    config = _config(base, ranks, rank, biased, whole, task_type)
    write_folder(path, config, tensors)
    return Extraction(path, errors, ranks, whole, left)


def _sites(base: nn.Module, changed: dict[str, Any]) -> dict[str, Site]:
    """The changed layers that one pair of factors can hold."""
    out = {}
    for name, module in base.named_modules():
        site = site_of(module, name, LoRA.sites) if name in changed else None
        if site is not None and site.kind in ("linear", "conv", "embedding") and not site.substitutes:
            out[name] = site
    return out


def _pairs(base: nn.Module, tuned: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Module path -> changed parameter -> its difference, float32."""
    first, second = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, tuned))
    odd = sorted(first.keys() ^ second.keys())
    if odd:
        raise AdapterError(f"the models have other parameters: {', '.join(odd[:3])} is in one of them only")
    out: dict[str, dict[str, Tensor]] = {}
    for key, p in first.items():
        q = second[key]
        if p.shape != q.shape:
            raise AdapterError(
                f"{key} is {tuple(p.shape)} in the base and {tuple(q.shape)} in the tuned model; bring both to one "
                "vocabulary with resize_token_embeddings first"
            )
        if not torch.equal(p, q.to(p)):
            path, _, leaf = key.rpartition(".")
            out.setdefault(path, {})[leaf] = q.float() - p.float()
    return out


def _layer(
    site: Site, name: str, changes: dict[str, Tensor], rank: int | None, error: float | None, biased: bool
) -> tuple[float, int, dict[str, Tensor]]:
    delta = changes.get("weight")
    D = torch.zeros(site.out, site.inp) if delta is None else site.to_canonical(delta).flatten(1)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    if rank is not None:
        r = min(rank, len(S))
    else:
        assert error is not None
        left = S.double().square().flip(0).cumsum(0).flip(0)
        r = max(int((left > error**2 * left[0]).sum()), 1)
    B, A = split(U, S, Vh, r, None)
    total = float(S.double().norm())
    lost = float(S[r:].double().norm()) / total if total else 0.0
    keys = ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    if site.kernel:
        A, B = A.reshape(r, site.inp, *site.kernel), B.reshape(site.out, r, *[1] * len(site.kernel))
    made = {f"{ROOT}{name}.{key}": t.contiguous() for key, t in zip(keys, (A, B), strict=True)}
    if biased:
        made[f"{ROOT}{name}.lora_B.bias"] = changes.get("bias", torch.zeros(site.out))
    return lost, r, made


def _rest(
    base: nn.Module, tuned: nn.Module, pairs: dict[str, dict[str, Tensor]], save: bool, tensors: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """What no factors hold: whole modules into `tensors`; the names of those, and of what is left out."""
    if not save:
        return [], sorted(f"{n}.{k}" if n else k for n, changes in pairs.items() for k in changes)
    leaves = {n for n, m in base.named_modules() if not list(m.children())}
    whole = [n for n in pairs if n in leaves]
    for name in whole:
        held = tuned.get_submodule(name).state_dict()
        tensors |= {f"{ROOT}{name}.{key}": t.detach().clone() for key, t in held.items()}
    return whole, sorted(f"{n}.{k}" for n, changes in pairs.items() if n not in leaves for k in changes)


def _config(
    base: Any, ranks: dict[str, int], rank: int | None, biased: bool, whole: Sequence[str], task: str | None
) -> LoraConfig:
    import re
    from collections import Counter

    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    odd = {f"^{re.escape(n)}": k for n, k in ranks.items() if k != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=odd,
        alpha_pattern=copy.copy(odd),
        target_modules=list(ranks),
        modules_to_save=list(whole) or None,
        lora_bias=biased,
        task_type=task,
        base_model_name_or_path=getattr(base, "name_or_path", None),
    )


def load_pair(base: str, tuned: str) -> tuple[nn.Module, nn.Module, str | None]:
    """Two models by name, of the base's own class, and the task type that its class means.

    Raises BaseModelError where one cannot be loaded.
    """
    import transformers

    from ..train.bases import _loading, _source, load_config, resolve_base

    ends = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    refs = [resolve_base(base), resolve_base(tuned)]
    name = (load_config(refs[0]).architectures or [""])[0]
    cls: Any = getattr(transformers, name, None) or transformers.AutoModel
    models = []
    for ref in refs:
        with _loading(ref):
            source, more = _source(ref)
            models.append(cls.from_pretrained(source, dtype="auto", **more).eval())
        models[-1].name_or_path = models[-1].config._name_or_path = ref.name
    return models[0], models[1], next((t for end, t in ends.items() if name.endswith(end)), None)
