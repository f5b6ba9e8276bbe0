"""transformers' loading of adapters: what it must rename in an adapter's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings that take an adapter file's keys to a model's: the wrapper's prefix goes, the adapter's name comes
    behind its tensors, then the architecture's own renamings apply."""
    from transformers.core_model_loading import WeightRenaming

    from .. import registry

    if not weight_conversions:
        return []
    prefix = "lora_" if peft_config is None else registry.method_of(peft_config).prefix
    own = [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}"),
    ]
    return own + [c for c in weight_conversions if isinstance(c, WeightRenaming)]
