"""PeftMixedModel: adapters of several methods on one model, all active together if asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .config import PeftConfig, PromptLearningConfig
from .errors import AdapterError
from .model import PeftModel
from .tuner import Tuner


class MixedTuner(Tuner):
    mixes = True


def _no_prompt(config: PeftConfig) -> None:
    if isinstance(config, PromptLearningConfig):
        name = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"The provided `peft_type` '{name}' is not compatible with the `PeftMixedModel`. Prompt methods act on "
            "the whole model; use a model of its own for it"
        )


class PeftMixedModel(PeftModel):
    """Each layer applies its active adapters in the order of set_adapter, neighbours of one method together; what is
    merged is the same composition."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        _no_prompt(peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Add an adapter of any method on layers beside the others. Raises ValueError for a prompt method."""
        _no_prompt(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def known(self, names: str | Iterable[str]) -> list[str]:
        """The names as a list; ValueError that names all those that are not adapters of this model."""
        listed = [names] if isinstance(names, str) else list(names)
        missing = sorted(set(listed) - set(self.peft_config))
        if missing:
            raise ValueError(f"Adapter(s) {missing} not found, available adapters: {sorted(self.peft_config)}")
        return listed

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter(self.known(adapter_name), inference_mode)

    def delete_adapter(self, adapter_name: str | Iterable[str]) -> None:
        """Remove adapters: all that are named, or none where one of them is unknown or merged."""
        names = self.known(adapter_name)
        merged = {n for _, layer in self.base_model.adapted_layers() for n in layer.merged_adapters}
        if held := sorted(merged.intersection(names)):
            raise AdapterError(f"Cannot delete adapter(s) {held} while they are merged. Please unmerge them first.")
        for name in names:
            super().delete_adapter(name)

    @staticmethod
    def _tuner_class() -> type[Tuner]:
        return MixedTuner
