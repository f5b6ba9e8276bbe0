"""Methods of peft's tuners that scripts and trainers written for it call, as functions of a Tuner, which finds them by
their names there (with an underscore in front of the losses).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import registry
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
    """How many numbers an adapter's file holds: its method's own (integers as the share of a float32 that they take),
    and the others (biases, modules saved whole)."""
    prefix, own, others = registry.method_of(tuner.peft_config[adapter]).prefix, 0.0, 0
    for key, t in collect(tuner, adapter).items():
        if prefix in key:
            own += t.numel() if t.is_floating_point() else t.numel() * t.element_size() / 4
        else:
            others += t.numel()
    return int(own), others


def print_savable_parameters(tuner: Tuner, adapter: str = "default") -> None:
    """Print these numbers."""
    own, others = get_nb_savable_parameters(tuner, adapter)
    method, total = registry.method_of(tuner.peft_config[adapter]).name, own + others
    print(f"{method} params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {total:,d}")


def _named(tuner: Tuner, names: Names) -> Iterable[str]:
    return tuner.host.active if names is None else [names] if isinstance(names, str) else names
