"""transformers' Trainer with a task's loss, and its arguments from a recipe."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from veneer.train.recipe import Recipe
from veneer.train.result import peak_memory_mb
from veneer.train.sampler import LengthBatches
from veneer.train.tasks import Task, get_task

__all__ = ["TaskTrainer", "training_arguments"]

#: what a short run on one machine wants, where it differs from TrainingArguments' own defaults
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "train_sampling_strategy": "group_by_length",
    "prediction_loss_only": True,
}


def training_arguments(recipe: Recipe, folder: str) -> TrainingArguments:
    """The recipe's `train` section over the defaults; checkpoints, if any are asked for, go under ``folder``.

    Raises:
        RecipeError: values that TrainingArguments refuses.
    """
    options = {**DEFAULTS, **get_task(recipe.task).train_defaults, **recipe.train}
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available() and not options.get("use_cpu", False))
    owned: dict[str, Any] = {
        "output_dir": folder,
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    try:
        return TrainingArguments(**options, **owned)
    except (ValueError, TypeError, ImportError) as error:
        named = next((key for key in recipe.train if key in str(error)), None)
        path = ("train",) if named is None else ("train", named)
        raise recipe.error(*path, problem=str(error)) from error


def log_every(args: TrainingArguments, rows: int) -> int:
    """Steps between two log lines: each step of a short run, a hundredth of a long one."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / batch) * args.num_train_epochs
    return max(1, int(steps // 100))


class TaskTrainer(Trainer):
    """Trainer that asks the task for its loss and logs tokens per second, peak memory and the time left."""

    def __init__(self, *, task: Task, **more: Any) -> None:
        super().__init__(**more)
        self.task = task
        # the task's losses are sums over the whole step's labels, divided by their number
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._tokens: torch.Tensor | int = 0
        self._marks = (0, 0.0)
        self._began = 0.0
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, padding left out."""
        return int(self._tokens)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The task's loss of one batch, or the smoothed loss, which needs every logit."""
        if model.training:
            self._began = self._began or time.monotonic()
            self._tokens = self._tokens + inputs["attention_mask"].sum()
        items = num_items_in_batch
        if isinstance(items, int):
            items = torch.tensor(items, device=inputs["input_ids"].device)
        if self.label_smoother is None:
            loss = self.task.loss(model, inputs, items)
        else:
            labels = inputs["labels"]
            logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
            # a prompt method's virtual tokens come first and have no label
            logits = {"logits": logits[:, -labels.shape[1] :]}
            loss = self.label_smoother(logits, labels, self.task.predicts_next, num_items_in_batch=items)
        if self.args.average_tokens_across_devices and items is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or "length" not in getattr(rows, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthBatches(rows["length"], batch, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this machine's numbers to a training log line."""
        if "loss" in logs and self._began:
            now, tokens = time.monotonic(), self.tokens
            before, when = self._marks if self._marks[1] else (0, self._began)
            done, left = self.state.global_step, self.state.max_steps - self.state.global_step
            logs["tokens_per_second"] = (tokens - before) / max(now - when, 1e-9)
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
            logs["eta"] = (now - self._began) / max(done, 1) * left
            self._marks = (tokens, now)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint holds the adapter and the tokenizer; Trainer adds the optimizer and its own state."""
        if self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            self.accelerator.unwrap_model(self.model).save_pretrained(folder)
            if isinstance(self.processing_class, PreTrainedTokenizerBase):
                self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        from safetensors.torch import load_file

        from veneer import set_peft_model_state_dict

        file = Path(str(self.state.best_model_checkpoint)) / "adapter_model.safetensors"
        tensors = load_file(file, device=str(self.args.device))
        set_peft_model_state_dict(self.accelerator.unwrap_model(self.model), tensors)
