"""transformers' Trainer with a task's loss, and its arguments from a recipe."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils import ModelOutput

from veneer import schedule
from veneer.files import write_json
from veneer.model import PeftModel
from veneer.train import processes
from veneer.train.checkpoints import WRITE_ERRORS, Changes, Progress, cannot_write, seal
from veneer.train.collate import batches
from veneer.train.custom_loss import CustomLoss, without_loss
from veneer.train.encode import IGNORE
from veneer.train.generate import evaluating
from veneer.train.loggers import check_loggers
from veneer.train.memory import MemoryOptions, check_memory, offloaded, step_in_backward, without_memory
from veneer.train.optimizer import OptimizerOptions, make_optimizer, without_optimizer
from veneer.train.recipe import Recipe
from veneer.train.result import peak_memory_mb
from veneer.train.sampler import LengthBatches
from veneer.train.stopping import without_stopping
from veneer.train.stream import FILE, Mark, Stream
from veneer.train.tasks import Outcome, Task, task_class

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
    check_loggers(recipe)
    given = without_stopping(without_loss(without_optimizer(without_memory(recipe.train))))
    options = {**DEFAULTS, **task_class(recipe.task).train_defaults, **given}
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available() and not options.get("use_cpu", False))
    options.setdefault("run_name", Path(recipe.out).name)
    processes.check_launch(recipe)
    if processes.several() > 1:
        options.setdefault("use_cpu", not torch.accelerator.is_available())
        if recipe.data.streaming:  # each process reads the stream and takes its rows: batches differ in length
            options.setdefault("accelerator_config", {"dispatch_batches": False})
    owned: dict[str, Any] = {
        "output_dir": folder,
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "label_names": list(task_class(recipe.task).label_columns),
    }
    try:
        args = TrainingArguments(**options, **owned)
    except (ValueError, TypeError, ImportError) as error:
        named = next((key for key in recipe.train if key in str(error)), None)
        path = ("train",) if named is None else ("train", named)
        raise recipe.error(*path, problem=str(error)) from error
    check_memory(recipe, args)
    return args


def log_every(args: TrainingArguments, rows: int) -> int:
    """Steps between two log lines: each step of a short run, a hundredth of a long one."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / batch) * args.num_train_epochs
    return max(1, int(steps // 100))


class _Epochs(TrainerCallback):
    def __init__(self, task: Task, collate: Any) -> None:
        self.task, self.collate = task, collate

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.task.begin_epoch(self.collate, int((state.epoch or 0) + 1e-6))


class _Resumed(TrainerCallback):
    """Gives the trainer back the part of a logged loss that the earlier attempt had summed up."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        earlier = self.trainer.earlier
        if earlier.step:
            self.trainer._tr_loss += earlier.loss
            self.trainer._globalstep_last_logged = earlier.logged
        elif args.process_index:  # what dropout draws is not to be alike in all of them
            torch.manual_seed(args.seed + args.process_index)


class TaskTrainer(Trainer):
    """Trainer that asks the task for its loss and logs tokens per second, peak memory and the time left.

    ``measure`` scores the model as it is; its numbers join the loss wherever Trainer evaluates. Its answers to the
    rows ``shown`` (prompt, expected) join the log: a line `{step, epoch, samples: [{prompt, expected, answer, ok}]}`.
    ``loss`` is used in place of the task's (custom_loss.py).
    """

    def __init__(
        self,
        *,
        task: Task,
        optimizer_options: OptimizerOptions | None = None,
        memory: MemoryOptions | None = None,
        measure: Callable[[], Outcome] | None = None,
        shown: Sequence[tuple[str, str]] = (),
        loss: CustomLoss | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.task = task
        self.measure, self.shown, self.custom_loss = measure, shown, loss
        self.add_callback(_Epochs(task, self.data_collator))
        self.add_callback(_Resumed(self))
        self.optimizer_options = optimizer_options or OptimizerOptions()
        self.memory = memory or MemoryOptions()
        # the task's losses are sums over the whole step's labels, divided by their number
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        #: how a training batch is laid out for the model
        self.batch_form: Callable[[Any], Any] | None = None
        self._tokens: torch.Tensor | int = 0
        self._stepping: list[Any] = []
        self._marks = (0, 0.0)
        self._began = 0.0
        #: where an earlier attempt had come to
        self.earlier = Progress()
        self._earlier_tokens = 0
        self.changes = Changes(self.accelerator.unwrap_model(self.model))
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, padding left out, by all processes (which must all ask)."""
        with processes.sharing():
            [total] = processes.summed(int(self._tokens))
        return int(total)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The task's loss of one batch, or the smoothed loss or the recipe's own, which need every logit."""
        if model.training:
            self._began = self._began or time.monotonic()
            self._tokens = self._tokens + inputs["attention_mask"].sum()
            # a loss of the recipe's own gets rows as they are
            inputs = inputs if self.batch_form is None or self.custom_loss else self.batch_form(inputs)
        items = num_items_in_batch
        if isinstance(items, int):
            items = torch.tensor(items, device=inputs["input_ids"].device)
        with offloaded(self.memory.activation_offload and model.training):
            loss = self._loss(model, inputs, items)
        if self.args.average_tokens_across_devices and items is not None:
            loss = loss * self.accelerator.num_processes
        if model.training:  # a step is the sum of its batches' losses
            loss = loss + self._penalty(model) / self.args.gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(self, model: torch.nn.Module, inputs: dict[str, Any], items: torch.Tensor | None) -> Any:
        if self.custom_loss is not None:
            scores = ModelOutput(logits=self.task.logits(model, inputs))
            return self.custom_loss(scores, inputs["labels"], num_items_in_batch=items)
        if self.label_smoother is None:
            return self.task.loss(model, inputs, items)
        logits = {"logits": self.task.logits(model, inputs)}
        return self.label_smoother(logits, inputs["labels"], self.task.predicts_next, num_items_in_batch=items)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counted = [self.task.items(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch([{"labels": item, "shift_labels": item} for item in counted], device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The test rows' loss, and the task's own scores beside it."""
        rows: Any = self.eval_dataset
        metrics = {"eval_loss": self._test_loss(rows)}
        if self.measure is not None:
            found = self.measure()
            self._log_answers(found)
            metrics = {f"eval_{name}": value for name, value in found.metrics.items()} | metrics
        return EvalLoopOutput(None, None, metrics, len(rows))  # type: ignore[arg-type]

    def _test_loss(self, rows: Any) -> float:
        """The mean over all labels, however they fall into batches; each row is read by one process."""
        model, size, device = self.accelerator.unwrap_model(self.model), self.args.eval_batch_size, self.args.device
        total, count = 0.0, 0.0
        averaged = getattr(self.optimizer, "eval", None)  # a schedule-free optimizer has weights for it
        if averaged is not None:
            averaged()
        with evaluating(model), processes.sharing():
            for _, batch in batches(rows, self.data_collator, size, device):
                items = (self.task.items(batch) != IGNORE).sum()
                if items:
                    with self.compute_loss_context_manager():
                        total += float(self._loss(model, batch, items)) * int(items)
                    count += int(items)
            total, count = processes.summed(total, count)
        return total / max(count, 1)

    def _log_answers(self, found: Outcome) -> None:
        """Into the history alone: a logger draws numbers."""
        rows = [
            {"prompt": prompt, "expected": expected, "answer": answer, "ok": ok}
            for (prompt, expected), answer, ok in zip(self.shown, found.outputs, found.correct)
        ]
        if rows and self.is_in_train:
            at: Any = {"epoch": self.state.epoch, "step": self.state.global_step}
            self.state.log_history.append(at | {"samples": rows})

    def _penalty(self, model: torch.nn.Module) -> Any:
        """What the adapters' methods themselves add to the loss."""
        inner: Any = self.accelerator.unwrap_model(model)
        return inner.base_model.extra_loss() if isinstance(inner, PeftModel) and inner.prompt_configs is None else 0.0

    def create_optimizer(self, model: Any = None) -> Any:
        """The recipe's optimizer, where it names one of veneer's; Trainer's own otherwise."""
        if self.optimizer is None and self.optimizer_options.optimizer is not None:
            inner = self.accelerator.unwrap_model(self.model if model is None else model)
            self.optimizer = make_optimizer(inner, self.args, self.optimizer_options)
        made = super().create_optimizer() if self.optimizer is None else self.optimizer
        if self.memory.optimizer_in_backward and not self._stepping:
            self._stepping = step_in_backward(made)
        return made

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; afterwards parameters no longer step by themselves."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for handle in self._stepping:
                handle.remove()
            self._stepping = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or "length" not in getattr(rows, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthBatches(rows["length"], batch, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this machine's numbers to a training log line."""
        if "loss" in logs and self._began:
            now, tokens = time.monotonic(), self.tokens
            before, when = self._marks if self._marks[1] else (self._earlier_tokens, self._began)
            done, left = self.state.global_step - self.earlier.step, self.state.max_steps - self.state.global_step
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

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A checkpoint that counts once it is complete; only then do older ones make way.

        Raises:
            RecipeError: it cannot be written. What was written of it is removed, earlier ones stay.
        """
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._progress().write(folder, self.args.process_index)
            processes.wait()
            if self.args.should_save:
                self.changes.save(self.accelerator.unwrap_model(self.model), folder)
                if self.stream is not None:
                    write_json(str(folder / FILE), self.stream.mark(self._features(self.state.global_step))._asdict())
                seal(folder)
        except WRITE_ERRORS as error:
            raise cannot_write(folder, error) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint)

    def _progress(self) -> Progress:
        seconds = self.earlier.seconds + (time.monotonic() - self._began if self._began else 0.0)
        loss, logged = float(self._tr_loss), self._globalstep_last_logged
        return Progress(
            self.state.global_step, int(self._tokens), seconds, loss, logged, self.control.should_training_stop
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        inner = self.accelerator.unwrap_model(self.model if model is None else model)
        folder = Path(resume_from_checkpoint)
        if not self.changes.load(inner, folder):
            inner.load_adapter(resume_from_checkpoint, inner.active_adapter, is_trainable=True)
        elif inner.prompt_configs is None and (folder / schedule.FILE).is_file():
            schedule.load(inner.base_model, inner.active_adapter, str(folder / schedule.FILE))
        self.earlier = Progress.read(folder, self.args.process_index)
        self._tokens = self.earlier.tokens
        self._earlier_tokens = self.tokens
        if self.stream is not None:
            mark = Mark(**json.loads((folder / FILE).read_text(encoding="utf-8")))
            self.stream.resume(self._features(self.earlier.step), mark)

    @property
    def stream(self) -> Stream | None:
        """The training rows, where they are streamed."""
        return self.train_dataset if isinstance(self.train_dataset, Stream) else None

    def _features(self, steps: int) -> int:
        """How many rows of tokens so many steps have taken, all processes together."""
        return steps * self.args.gradient_accumulation_steps * self.args.train_batch_size * self.args.world_size

    def _run_epoch(self, **more: Any) -> None:  # type: ignore[override]
        """Trainer's pass over the rows, unless the earlier attempt had come to its end."""
        if self.earlier.step and (self.earlier.stopped or self.state.global_step >= self.state.max_steps):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**more)

    def _load_best_model(self) -> None:
        self.changes.load(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)))
