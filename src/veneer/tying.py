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


def tied_with(model: nn.Module, paths: Iterable[str], cfg: Any) -> dict[str, list[str]]:
    """Each path's partners where the config asks to keep them tied; warns where there are none."""
    if not getattr(cfg, "ensure_weight_tying", False):
        return {}
    found = {path: others for path in paths if (others := partners(model, path))}
    if not found and not getattr(cfg, "trainable_token_indices", None):
        warnings.warn(
            f"ensure_weight_tying is set, but none of the modules in modules_to_save or target_modules of "
            f"{type(model).__name__} holds a weight that another module holds too",
            PeftWarning,
            stacklevel=2,
        )
    return found


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


def tie_factors(name: str, layers: Iterable[Adapted]) -> None:
    """Give linear layers the factors of the embedding whose weight they hold, for one LoRA adapter."""
    layers = list(layers)
    for source in (layer for layer in layers if layer.site.kind == "embedding"):
        for layer in layers:
            if layer.site.kind != "linear" or layer.site.stored is not source.site.stored:
                continue
            entry, given = layer.entries[name], source.entries[name].where
            for mine, theirs in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
                box, adapter = given[theirs]
                slot = Transposed(box, adapter)
                held: Any = layer._modules[mine]
                held[name] = slot
                entry.where[mine] = (slot, "weight")
                entry.specs[f"{mine}.weight"] = dataclasses.replace(entry.specs[f"{mine}.weight"], train=False)
            layer.changed()
