"""ensure_weight_tying: modules that hold one weight (an embedding and its head) stay one in what is trained.

With modules_to_save the copies share their weight. With LoRA the head's factors are the embedding's,
transposed (lora_A = lora_embedding_B.T, lora_B = lora_embedding_A.T), so that both weights change alike; they
are trained once.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PeftWarning
from .layer import Adapted
from .parameters import plain_modules


def partners(model: nn.Module, path: str) -> list[str]:
    """Paths of the other modules that hold the same weight as the module at `path`, as before wrapping."""
    plain = dict(plain_modules(model, saved=True))
    weight = plain[path]._parameters.get("weight") if path in plain else None
    return (
        [] if weight is None else [p for p, m in plain.items() if p != path and m._parameters.get("weight") is weight]
    )


def _says_untied(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "tie_word_embeddings", True) is False


def _tied(model: nn.Module) -> list[list[str]]:
    """Groups of modules that hold one weight; none where the model's config says that words are not tied."""
    if _says_untied(model):
        return []
    groups: dict[int, list[str]] = {}
    for path, module in plain_modules(model, saved=True):
        weight = module._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def tied_with(model: nn.Module, paths: Iterable[str], cfg: Any) -> dict[str, list[str]]:
    """Each path's partners where the config asks to keep them tied. Warns where it asks and there are none, and where
    it does not ask and one of two tied modules is to be trained."""
    option = hasattr(cfg, "ensure_weight_tying")
    asked = option and cfg.ensure_weight_tying
    groups, paths = _tied(model), list(paths)
    found = {path: [p for p in group if p != path] for path in paths for group in groups if path in group}
    said = None
    if not asked and found and not cfg.inference_mode:
        path, others = next(iter(found.items()))
        why = (
            "`ensure_weight_tying` is not set to True"
            if option
            else f"no implementation exists to tie the adapters of {type(cfg).__name__}"
        )
        said = (
            f"{path} holds the same weight as {', '.join(others)}, and {why}: what is trained there changes that "
            "module alone, and merging unties the two"
        )
    elif asked and not found and not getattr(cfg, "trainable_token_indices", None):
        said = "ensure_weight_tying is set, but " + (
            "no tied modules are added to modules_to_save or target_modules: the model ties "
            + "; ".join(" and ".join(group) for group in groups)
            if groups
            else f"no tied modules were found in the model ({type(model).__name__}): no two hold one weight, or its "
            "config says tie_word_embeddings=False"
        )
    if said is not None:
        warnings.warn(said, PeftWarning, stacklevel=2)
    return found if asked else {}


def tied_with_embedding(model: Any) -> list[str]:
    """Paths of the modules that hold the input embedding's weight, too; none where the model's config does not tie."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _says_untied(base):
        return []
    table = base.get_input_embeddings()
    table = table.get_base_layer() if isinstance(table, Adapted) else table
    path = next((p for p, m in plain_modules(base, saved=True) if m is table), None)
    return [] if path is None else sorted(partners(base, path))


class Transposed(nn.Module):
    """Stands for a trained factor of another layer, transposed; writing to it writes to that factor."""

    def __init__(self, box: nn.Module, adapter: str):
        super().__init__()
        self.__dict__["source"] = (box, adapter)  # not a child: the tensor is the other layer's

    @property
    def weight(self) -> Tensor:
        box, adapter = self.__dict__["source"]
        return getattr(box, adapter).T

    @weight.setter
    def weight(self, value: Tensor) -> None:
        box, adapter = self.__dict__["source"]
        with torch.no_grad():
            getattr(box, adapter).copy_(value.T)


def tie_factors(model: nn.Module, name: str, layers: Iterable[Adapted]) -> None:
    """Give linear layers the factors of the embedding whose weight they hold, for one LoRA adapter: of several that
    of the model itself (T5's `shared`), not its encoder's or decoder's. Nothing where the model's config says that
    words are not tied."""
    if _says_untied(model):
        return
    layers = sorted(layers, key=lambda layer: layer.site.name.count("."))
    sources: dict[int, Adapted] = {}
    for layer in layers:
        if layer.site.kind == "embedding":
            sources.setdefault(id(layer.site.stored), layer)
    for layer in layers:
        held = sources.get(id(layer.site.stored))
        if layer.site.kind != "linear" or held is None:
            continue
        entry, given = layer.entries[name], held.entries[name].where
        for mine, theirs in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
            box, adapter = given[theirs]
            slot = Transposed(box, adapter)
            slots: Any = layer._modules[mine]
            slots[name] = slot
            entry.where[mine] = (slot, "weight")
            entry.specs[f"{mine}.weight"] = dataclasses.replace(entry.specs[f"{mine}.weight"], train=False)
        layer.changed()
