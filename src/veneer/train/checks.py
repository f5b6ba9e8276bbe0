"""Every check of a recipe that needs no weights: names, types, files, columns, options that fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.train import fields
from veneer.train.errors import DataError, RecipeError, nearest
from veneer.train.new_tokens import check_tokens
from veneer.train.recipe import Recipe

__all__ = ["check_recipe"]


def check_recipe(recipe: Recipe) -> None:
    """Check names, types, files and columns of a recipe; reads no weights, and of a data file only the head.

    Raises:
        RecipeError: at the first thing that is wrong.
    """
    from veneer.train.tasks import TASKS

    source = recipe._source
    if recipe.task not in TASKS:
        hint = f"The tasks are {', '.join(TASKS)}."
        raise source.error(("task",), f"unknown task {recipe.task!r}", near=nearest(recipe.task, TASKS), hint=hint)
    _check_options(recipe)
    _check_data(recipe)
    _check_base(recipe)
    _check_out(recipe)
    _check_adapter(recipe)
    _check_train(recipe)


def _check_options(recipe: Recipe) -> None:
    from veneer.train.tasks import task_class, task_of

    cls = task_class(recipe.task)
    fields.check_options(cls.Options, recipe.options, "options", recipe._source, owned={})
    try:
        task_of(recipe)
    except ValueError as error:
        named = next((key for key in recipe.options if key in str(error)), None)
        path = ("options",) if named is None else ("options", named)
        raise recipe.error(*path, problem=str(error)) from error
    if recipe.eval.metric not in cls.metrics:
        hint = f"For {recipe.task} it is {_or(cls.metrics)}."
        raise recipe.error("eval", "metric", problem=f"{recipe.eval.metric!r} does not fit {recipe.task}", hint=hint)
    if not cls.smooths and recipe.train.get("label_smoothing_factor"):
        hint = f"Leave it out; {recipe.task} has no cross entropy over labels."
        raise recipe.error("train", "label_smoothing_factor", problem="does not fit the task", hint=hint)
    if recipe.options.get("class_weights") and recipe.train.get("label_smoothing_factor"):
        problem, hint = "given beside `options.class_weights`, which it would leave out", "Keep one of the two."
        raise recipe.error("train", "label_smoothing_factor", problem=problem, hint=hint)


def _or(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _check_train(recipe: Recipe) -> None:
    from veneer.train.custom_loss import LossOptions, custom_loss
    from veneer.train.memory import MemoryOptions
    from veneer.train.optimizer import OptimizerOptions, optimizer_options
    from veneer.train.stopping import StopOptions, check_stopping

    taken = (fields.training_arguments_class(), OptimizerOptions, MemoryOptions, LossOptions, StopOptions)
    fields.check_options(taken, recipe.train, "train", recipe._source, owned=fields.OWNED_TRAIN)
    custom_loss(recipe)
    check_stopping(recipe)
    try:
        chosen = optimizer_options(recipe.train).optimizer
    except ValueError as error:
        key = "optimizer" if "optimizer" in recipe.train else "loraplus_lr_ratio"
        raise recipe.error("train", key, problem=str(error)) from error
    if chosen is not None and recipe.adapter.method.lower() != "lora":
        problem = f"{chosen} is made for LoRA's A and B, and the method is {recipe.adapter.method}"
        raise recipe.error("train", "optimizer", problem=problem, hint="Set `adapter.method: lora`, or use `optim`.")
    if chosen is not None and "optim" in recipe.train:
        raise recipe.error("train", "optim", problem="given beside `train.optimizer`", hint="Keep one of the two.")


def _check_data(recipe: Recipe) -> None:
    from veneer.train import data

    for name in ("train", "test", "validation"):
        if getattr(recipe.data, name) is None:
            continue
        try:
            data.check_columns(recipe.data, name, recipe.task)
        except DataError as error:
            error.key = error.key or f"data.{name}"
            if error.file is None:
                path = [int(part) if part.isdecimal() else part for part in error.key.split(".")]
                place = recipe.error(*path, problem="")
                error.file, error.line = place.file, place.line
            raise
    if recipe.data.streaming:
        _check_streaming(recipe)
    if recipe.data.test and recipe.data.split:
        raise recipe.error("data", "split", problem="given beside `data.test`", hint="Keep one of the two.")


def _check_streaming(recipe: Recipe) -> None:
    """What needs to know all rows before the first step."""
    steps, workers = recipe.train.get("max_steps"), recipe.train.get("dataloader_num_workers", 0)
    if not isinstance(steps, int) or steps < 1:
        hint = "Say how long to train, for example `train: {max_steps: 1000}`."
        raise recipe.error("train", "max_steps", problem="a stream of rows has no end, and this is missing", hint=hint)
    if recipe.data.split is not None:
        hint = "Give the test rows as a file, with `data.test`."
        raise recipe.error("data", "split", problem="rows that are streamed cannot be split", hint=hint)
    if isinstance(workers, int) and workers > 1:
        hint = "Set it to 1, which reads ahead while the model trains, or leave it out."
        raise recipe.error("train", "dataloader_num_workers", problem="a stream is read by one process", hint=hint)
    if recipe.options.get("class_weights") == "balanced":
        hint = "Give the weights by label, or leave out `data.streaming`."
        problem = "`balanced` counts all rows, and these are streamed"
        raise recipe.error("options", "class_weights", problem=problem, hint=hint)


def _check_base(recipe: Recipe) -> None:
    from veneer.train.bases import resolve_base

    try:
        resolve_base(recipe.base)
    except RecipeError as error:
        place = recipe.error("base", "name", problem="")
        error.key, error.file, error.line = (
            error.key or "base",
            error.file or place.file,
            error.line or place.line,
        )
        raise


def _check_out(recipe: Recipe) -> None:
    out = Path(recipe.out)
    if out.exists() and not out.is_dir():
        raise recipe.error("out", problem=f"{out} is a file", hint="Name a folder that does not exist yet.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "result.json").is_file():
        problem = f"the folder {out} holds something other than a run"
        raise recipe.error("out", problem=problem, hint="Name a folder that does not exist yet.")
    if not recipe.overwrite:
        hint = "Name another folder, or set `overwrite: true` to replace the run."
        raise recipe.error("out", problem=f"the folder {out} already holds a run", hint=hint)


def _check_adapter(recipe: Recipe) -> None:
    cls = fields.config_class(recipe.adapter.method)
    if cls is None:
        names = fields.method_names()
        problem = f"unknown method {recipe.adapter.method!r}"
        near, hint = nearest(recipe.adapter.method, names), f"The methods are {', '.join(names)}."
        raise recipe.error("adapter", "method", problem=problem, near=near, hint=hint)
    options = recipe.adapter.options
    fields.check_options(cls, options, "adapter", recipe._source, owned=fields.OWNED_ADAPTER)
    check_tokens(recipe, cls)
    from veneer.train.tasks import task_class

    try:
        cls(**options, task_type=task_class(recipe.task).task_type)
    except (ValueError, TypeError, ImportError) as error:
        named = next((key for key in options if key in str(error)), None)
        path = ("adapter",) if named is None else ("adapter", named)
        raise recipe.error(*path, problem=str(error)) from error
