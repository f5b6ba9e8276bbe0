"""Methods of peft's tuners that scripts and trainers written for it call, as functions of a Tuner, which finds them by
their names there (some with an underscore in front).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import registry, storage
from ..state import collect

if TYPE_CHECKING:
    from ..tuner import Tuner

Names = str | list[str] | None


def get_kasa_loss(tuner: Tuner, adapter_names: Names = None) -> Any:
    """KaSA's penalties, of the active adapters unless others are named."""
    return tuner.losses_of(_named(tuner, adapter_names), "KASA")


def get_monteclora_loss(tuner: Tuner, adapter_names: Names = None) -> Any:
    """MonteCLoRA's divergences, likewise; 0.0 outside training."""
    return tuner.losses_of(_named(tuner, adapter_names) if tuner.training else (), "MONTECLORA")


def get_nb_savable_parameters(tuner: Tuner, adapter: str = "default") -> tuple[int, int]:
    """How many numbers of an adapter's method its file holds (integers as the share of a float32 that they take), and
    how many others train (biases, modules saved whole, what was unfrozen by hand)."""
    prefix, own = registry.method_of(tuner.peft_config[adapter]).prefix, 0.0
    for key, t in collect(tuner, adapter).items():
        if prefix in key:
            own += t.numel() if t.is_floating_point() else t.numel() * t.element_size() / 4
    others = sum(p.numel() for name, p in tuner.named_parameters() if p.requires_grad and prefix not in name)
    return int(own), others


def print_savable_parameters(tuner: Tuner, adapter: str = "default") -> None:
    """Print these numbers."""
    own, others = get_nb_savable_parameters(tuner, adapter)
    method, total = registry.method_of(tuner.peft_config[adapter]).name, own + others
    print(f"{method} params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {total:,d}")


def init_shared(tuner: Tuner, config: Any, adapter_name: str) -> None:
    """Draw an adapter's shared trained tensors again, as `config` says."""
    sites = [layer.site for _, layer in tuner.adapted_layers() if adapter_name in layer.entries]
    for key, spec in registry.method_of(config).shared(config, sites).items():
        if spec.train:
            assert isinstance(spec.value, Tensor)
            with torch.no_grad():
                getattr(*storage.holder_of(tuner, key, adapter_name)).copy_(spec.value)


init_tinylora_v = init_vblora_vector_bank = init_shared


def _named(tuner: Tuner, names: Names) -> Iterable[str]:
    return tuner.host.active if names is None else [names] if isinstance(names, str) else names
