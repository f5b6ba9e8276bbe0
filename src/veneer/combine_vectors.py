"""add_weighted_adapter for IA3: l = sum_i weight_i l_i, as peft adds them; 1 is the identity, so weights that add up
to 1 keep it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .combine import Combined
from .errors import AdapterError

if TYPE_CHECKING:
    from .tuner import Tuner


def add_weighted_vectors(
    tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> Combined:
    """Add adapter `adapter_name`, the weighted sum of IA3 adapters on the same layers; it is not made active.

    Raises ValueError for names and weights that do not fit, AdapterError where the adapters differ in their layers or
    in which of them are scaled at the input. Nothing is added then.
    """
    names = tuner.known(adapters)
    if len(names) != len(weights) or not names:
        raise ValueError(f"{len(names)} adapters and {len(weights)} weights; give one weight for each adapter")
    found = {n: {p: x for p, x in tuner.adapted_layers() if n in x.entries} for n in names}
    first = found[names[0]]
    shapes = {n: {p: tuple(x.view(n).ia3_l.shape) for p, x in layers.items()} for n, layers in found.items()}
    for n in names[1:]:
        if shapes[n] != shapes[names[0]]:
            raise AdapterError(
                f"adapters {names[0]!r} and {n!r} scale different layers, or one at the input and the other at the "
                "output, so their vectors do not add up; combine adapters with the same targets"
            )
    tuner.add_adapter(adapter_name, copy.copy(tuner.peft_config[names[0]]))
    with torch.no_grad():
        for layer in first.values():
            total = sum(w * layer.view(n).ia3_l for n, w in zip(names, weights, strict=True))
            layer.view(adapter_name).fill("ia3_l", total)
    return Combined(adapter_name, "linear", dict.fromkeys(first, 0.0))
