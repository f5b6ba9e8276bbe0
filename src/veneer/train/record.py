"""Measures the adapter's layers at the end of training, while the model is still in memory."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.inspection import LayerDelta, inspect_adapter

__all__ = ["LayerRecorder"]


class LayerRecorder(TrainerCallback):
    """After training, ``layers`` holds one LayerDelta per low-rank layer of the trained adapter."""

    def __init__(self) -> None:
        self.layers: list[LayerDelta] = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.layers = inspect_adapter(kwargs["model"])
