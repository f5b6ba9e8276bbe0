"""LayerwiseHandoff: `handoff_stages.Stages` run by transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import AdapterError, PeftWarning
from .handoff_stages import Stages


class LayerwiseHandoff(TrainerCallback):
    """Trains an adapter's blocks one after another; each block's A starts as the one before ended.

        Trainer(model, args, ..., callbacks=[LayerwiseHandoff(model, steps_per_stage=100)])

    steps_per_stage or epochs_per_stage: how long a stage is; neither: the run is divided evenly. The last
    stage lasts until the end. blocks_per_stage, keep_training, tensors: see `Stages`. Tensors outside the
    adapter's layers (a head in modules_to_save) train all along. A resumed run goes on in the stage its step
    or epoch belongs to.

    A learning rate that decays gives later blocks less of it: use lr_scheduler_type="constant". Under DDP set
    ddp_find_unused_parameters=True. FSDP with flat parameters is refused: it cannot freeze part of one.

    Raises AdapterError where the adapter is trained already, shares tensors between layers, or where the
    optimizer does not hold all its tensors.
    """

    def __init__(
        self, model: nn.Module, adapter: str | None = None, *, steps_per_stage: int | None = None,
        epochs_per_stage: int | None = None, blocks_per_stage: int = 1, keep_training: bool = False,
        tensors: Sequence[str] | None = None,
    ):  # fmt: skip
        if steps_per_stage is not None and epochs_per_stage is not None:
            raise AdapterError("give steps_per_stage or epochs_per_stage, not both")
        for name, value in (("steps_per_stage", steps_per_stage), ("epochs_per_stage", epochs_per_stage)):
            if value is not None and value < 1:
                raise AdapterError(f"{name}={value}: must be at least 1")
        self.stages = Stages(
            model, adapter, blocks_per_stage=blocks_per_stage, keep_training=keep_training, tensors=tensors
        )
        self.steps, self.epochs = steps_per_stage, epochs_per_stage

    def _due(self, state: TrainerState) -> int:
        """The stage that training is in at this point."""
        if self.epochs is not None:
            stage = int((state.epoch or 0) + 1e-6) // self.epochs
        else:
            stage = state.global_step // self._steps(state)
        return min(stage, len(self.stages) - 1)

    def _steps(self, state: TrainerState) -> int:
        return self.steps or max(1, state.max_steps // len(self.stages))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not all(id(p) in held for p in self.stages.parameters()):
                raise AdapterError(
                    f"the optimizer does not hold all tensors of adapter {self.stages.adapter!r}: they must "
                    "all be trainable when Trainer builds it (call set_adapter before), and not be flattened "
                    "by FSDP"
                )
        if self.epochs is None:
            reached = -(-state.max_steps // self._steps(state))
        else:
            reached = -(-int(state.num_train_epochs or 0) // self.epochs)
        if reached < len(self.stages):
            warnings.warn(
                f"this run ends in stage {reached} of {len(self.stages)}: the layers after "
                f"{self.stages.stages[reached - 1][-1][0]} will not be trained. Train longer, or shorten the "
                "stages.",
                PeftWarning,
                stacklevel=2,
            )
        self.stages.begin(self._due(state))

    def _move(self, state: TrainerState) -> None:
        while self.stages.current < self._due(state):
            self.stages.advance()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.epochs is None:
            self._move(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.epochs is not None:
            self._move(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stages.release()
