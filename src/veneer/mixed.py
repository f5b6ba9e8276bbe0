"""PeftMixedModel: adapters of several methods on one model, all active together if asked."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import PeftConfig, PromptLearningConfig
from .model import PeftModel
from .tuner import Tuner


class MixedTuner(Tuner):
    mixes = True


class PeftMixedModel(PeftModel):
    """Each layer applies its active adapters in the order of set_adapter, neighbours of one method together; what is
    merged is the same composition."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        if isinstance(peft_config, PromptLearningConfig):
            raise ValueError(
                f"The provided `peft_type` '{peft_config.peft_type}' is not compatible with the `PeftMixedModel`: "
                "prompt methods act on the whole model"
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @staticmethod
    def _tuner_class() -> type[Tuner]:
        return MixedTuner
