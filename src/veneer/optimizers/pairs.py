"""The (A, B) pairs of a model's LoRA adapters, as the optimizers need them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layer import adapted_layers
from ..site import Site


@dataclass(frozen=True)
class Pair:
    """One adapter on one layer: its stored factors, its scaling and the layer they belong to."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    site: Site


def pairs(model: nn.Module, adapters: list[str] | None = None) -> Iterator[Pair]:
    """Pairs of the named adapters (by default the active ones) on linear, convolution and attention layers.

    Embeddings are left out: their input is ids and their A starts at zero. So are stacks of experts, whose factors
    are no single pair.
    """
    for _, layer in adapted_layers(model):
        if layer.site.kind == "embedding" or layer.site.experts > 1:
            continue
        for name in layer.active_adapters if adapters is None else adapters:
            entry = layer.entries.get(name)
            if entry is None or not {"lora_A", "lora_B"} <= entry.where.keys():
                continue
            A, B = (getattr(*entry.where[key]) for key in ("lora_A", "lora_B"))
            yield Pair(A, B, layer.scaling[name], layer.site)


def group_stacks(t: torch.Tensor, groups: int) -> torch.Tensor:
    """A factor as a stack over a convolution's groups: (groups, rows, columns)."""
    return t.flatten(1).unflatten(0, (groups, -1))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def named_trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
