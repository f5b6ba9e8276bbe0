"""A run before its weights: the rows as tokens, the base's config, the adapter's config, every check on the way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.available import has
from veneer.backends.loading import QUANTISED
from veneer.train import fields
from veneer.train.bases import BaseRef, load_config, load_tokenizer, resolve_base
from veneer.train.data import Table, load_table, load_tables
from veneer.train.data_warnings import data_warnings, row_for_row
from veneer.train.errors import DataError
from veneer.train.new_tokens import add_tokens, train_rows
from veneer.train.recipe import Recipe
from veneer.train.stream import RowStream, Stream, open_stream
from veneer.train.tasks import Plan, Task, task_class, task_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

__all__ = ["Parts", "adapter_config", "model_options", "prepare", "read_rows"]


@dataclass
class Parts:
    """What a run works with once its inputs are read and before its weights are. ``tokens``: ids of new ones."""

    ref: BaseRef
    task: Task
    plan: Plan
    config: Any
    tokenizer: Any
    args: TrainingArguments
    notes: list[str]
    tokens: list[int] = field(default_factory=list)


def prepare(recipe: Recipe, checkpoints: Path, warn: bool = False) -> Parts:
    """Everything that can fail without weights, in the order in which it is cheap to find out.

    With ``warn`` the notes say what is odd about the rows, too.
    """
    from veneer.train.trainer import log_every, training_arguments

    task = task_of(recipe)
    args = training_arguments(recipe, str(checkpoints))
    rows, train, test = read_rows(recipe)
    if "logging_steps" not in recipe.train:
        args.logging_steps = log_every(args, len(train))
    ref = resolve_base(recipe.base)
    if recipe.base.quantize is not None and not has(QUANTISED[recipe.base.quantize]):
        problem = f"{recipe.base.quantize} needs {QUANTISED[recipe.base.quantize]}, which is not installed"
        raise recipe.error("base", "quantize", problem=problem, hint="Run `pip install 'veneer[quant]'`.")
    config, tokenizer = load_config(ref), load_tokenizer(ref, task.whole_words)
    tokens = add_tokens(recipe, tokenizer)
    plan = task.plan(recipe, train, test, tokenizer, config)
    if args.eval_strategy != "no" and plan.test is None:
        hint = "Set `data.test`, `data.validation` or `data.split`."
        raise recipe.error("train", "eval_strategy", problem="there are no test rows", hint=hint)
    _check_vocabulary(recipe, plan.train, train, config, ref, tokens)
    if rows is not None:

        def encode(table: Table) -> Any:
            made = task.more_rows(plan, recipe, table, tokenizer, config)
            _check_vocabulary(recipe, made, table, config, ref, tokens)
            return made

        together = args.train_sampling_strategy == "group_by_length" and "length" in plan.train.column_names
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        plan.stream = Stream(rows, encode, step if together else None)
    notes = [*train.notes, *plan.notes]
    if plan.test is None:
        how = "`data.test` or `data.split`" if rows is None else "`data.test`"
        notes.append(f"No test rows: nothing is measured. Set {how}.")
    if tokens:
        named = ", ".join(f"{token} ({number})" for token, number in zip(recipe.tokens, tokens, strict=True))
        notes.append(f"New tokens, which start at the mean of the others: {named}.")
    parts = Parts(ref, task, plan, config, tokenizer, args, notes, tokens)
    if warn:
        notes += data_warnings(recipe, parts, train, test)
    return parts


def read_rows(recipe: Recipe) -> tuple[RowStream | None, Table, Table | None]:
    """The stream of training rows, where they are streamed, all of them or the first, and the test rows."""
    if not recipe.data.streaming:
        return None, *load_tables(recipe.data, recipe.task, recipe.seed)
    return *open_stream(recipe), load_table(recipe.data, "test", recipe.task, recipe.seed)


def _check_vocabulary(recipe: Recipe, rows: Dataset, table: Table, config: Any, ref: BaseRef, new: list[int]) -> None:
    size = max([config.get_text_config().vocab_size, *(token + 1 for token in new)])
    for name in (name for name in rows.column_names if name.endswith("input_ids")):
        for number, row in enumerate(rows[name]):
            if max(row, default=0) >= size:
                problem = f"token {max(row)} is outside the {size} rows of {ref.name}'s embedding"
                hint = "The tokenizer and the model do not belong together."
                if row_for_row(recipe, rows, table):
                    raise table.error(number, problem, hint)
                raise DataError(problem, file=table.path, hint=hint)


def model_options(plan: Plan) -> dict[str, Any]:
    """What the rows say about the model's config."""
    names = {} if plan.label_names is None else {"id2label": dict(enumerate(plan.label_names))}
    return {**plan.model_options, **names}


def adapter_config(recipe: Recipe, model: Any, parts: Parts) -> Any:
    """The adapter's config; a head that the base did not hold is trained and saved with it."""
    cls = fields.config_class(recipe.adapter.method)
    assert cls is not None  # check_recipe has seen it
    config = cls(**recipe.adapter.options, task_type=task_class(recipe.task).task_type)
    config.base_model_name_or_path, config.revision = parts.ref.name, parts.ref.revision
    if model.fresh_modules and "modules_to_save" in {item.name for item in dataclasses.fields(cls)}:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *model.fresh_modules})
    train_rows(config, model, parts.tokens)
    if recipe.merge and config.is_prompt_learning:
        problem = f"{recipe.adapter.method} adds virtual tokens and cannot be merged into the weights"
        raise recipe.error("merge", problem=problem, hint="Set `merge: false`.")
    if config.is_prompt_learning and "position_ids" in parts.plan.train.column_names:
        problem = f"{recipe.adapter.method} puts virtual tokens before a row, and packed rows have other rows there"
        raise recipe.error("options", "packing", problem=problem, hint="Set `options.packing: none`.")
    return config
