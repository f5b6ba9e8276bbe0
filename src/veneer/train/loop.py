"""One training run: check, read, load, measure, train, measure again, write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train import initial, processes
from veneer.train.attempt import Attempt, attempt
from veneer.train.bases import load_base, quiet, safe_pad
from veneer.train.checks import check_recipe
from veneer.train.errors import RecipeError
from veneer.train.new_tokens import add_tokens, make_rows
from veneer.train.prepare import Parts, adapter_config, model_options, prepare
from veneer.train.purpose import purpose_of, write_purpose
from veneer.train.recipe import Recipe
from veneer.train.result import RunResult, Sample, describe_machine, write_result
from veneer.train.tasks import Outcome, Plan

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerCallback

    from veneer.train.trainer import TaskTrainer

__all__ = ["RunResult", "Sample", "run"]


def run(
    recipe: Recipe,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
) -> RunResult:
    """Train an adapter as the recipe says and write `recipe.out` whole, or not at all.

    The folder gets `adapter/` (adapter and tokenizer), `log.jsonl`, `result.json`, `recipe.yaml`, and
    `merged/` where `recipe.merge` is set. A run that was cut short goes on from its last whole checkpoint when it is
    called again with the same recipe and rows, and ends as if nothing had happened. Where a launcher has started
    several processes they share the batches; all get the result, and the main one writes and prints.

    Args:
        callbacks: transformers callbacks; a log line carries tokens_per_second, peak_memory_mb and eta.
        console: where notes are printed, if anywhere.

    Raises:
        RecipeError: (DataError, BaseModelError) before any weight is loaded, wherever that can be told.
    """
    check_recipe(recipe)
    begun, console = processes.begin(), console if processes.is_main() else None
    try:
        with attempt(recipe) as now:
            parts = processes.main_first(lambda: prepare(recipe, now.checkpoints, warn=True))
            for note in (*now.notes, *parts.notes):
                _say(console, note)
            result = _train(recipe, parts, callbacks, console, now)
            if processes.is_main():
                write_result(result, now.folder)
    finally:
        if begun:
            processes.end()
    return result


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, markup=False, highlight=False)


def _train(
    recipe: Recipe,
    parts: Parts,
    callbacks: Sequence[TrainerCallback],
    console: Console | None,
    now: Attempt,
) -> RunResult:
    import transformers

    from veneer.prepare import prepare_model_for_kbit_training
    from veneer.train.loggers import reporting

    task, plan, args = parts.task, parts.plan, parts.args
    transformers.set_seed(recipe.seed)
    model, tokenizer = load_base(parts.ref, recipe.task, **model_options(plan))
    make_rows(model, add_tokens(recipe, tokenizer))
    _pad(model, tokenizer, parts, console)
    if parts.ref.quantize is None:
        model.to(args.device)
    else:  # it lies where it was quantised
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer sees to that
    task.check_model(model, plan)
    before = processes.from_main(now.load_before() if processes.is_main() else None)
    if before is None:
        before = _measure(recipe, parts, model, tokenizer, console, "the base model")
        if processes.is_main():
            now.save_before(before)
    model, collate = _adapt(recipe, parts, model, tokenizer, console)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    what = f"{len(plan.train)} rows" if plan.stream is None else "a stream of rows"
    _say(console, f"Training {trainable:,} of {total:,} parameters on {what}.")
    trainer = _trainer(recipe, parts, model, tokenizer, collate, callbacks)
    with reporting(trainer, now.folder, before.metrics) as report:
        seconds = _run(recipe, parts, trainer, now, console)
        after = _measure(recipe, parts, model, tokenizer, console, "the tuned model")
        report(after.metrics)
    merged = False
    if processes.is_main():
        _save_adapter(recipe, model, tokenizer, plan, now.folder)
        merged = _merge(recipe, model, tokenizer, now.folder, parts, console)
    parts.notes, merged = processes.from_main((parts.notes, merged))
    return _result(recipe, parts, trainer, (before, after), seconds, (trainable, total), merged)


def _result(
    recipe: Recipe,
    parts: Parts,
    trainer: TaskTrainer,
    scored: tuple[Outcome, Outcome],
    seconds: float,
    params: tuple[int, int],
    merged: bool,
) -> RunResult:
    """``scored``: before and after; ``params``: trained and all."""
    out, (before, after), plan = Path(recipe.out).absolute(), scored, parts.plan
    return RunResult(
        out=str(out),
        task=recipe.task,
        recipe=recipe,
        history=[row for row in trainer.state.log_history if row.keys() & {"loss", "eval_loss", "samples"}],
        before=before.metrics,
        after=after.metrics,
        samples=_samples(recipe, plan, before, after),
        train_seconds=seconds,
        train_tokens=trainer.tokens,
        trainable_params=params[0],
        total_params=params[1],
        adapter_dir=str(out / "adapter"),
        merged_dir=str(out / "merged") if merged else None,
        machine=describe_machine(parts.args.device),
        notes=[*parts.notes, *([] if plan.stream is None else plan.stream.describe())],
    )


def _adapt(recipe: Recipe, parts: Parts, model: Any, tokenizer: Any, console: Console | None) -> tuple[Any, Any]:
    """The model with its adapter, from the recipe's seed on, and what makes batches."""
    import transformers

    from veneer import get_peft_model

    task, plan, args = parts.task, parts.plan, parts.args
    transformers.set_seed(recipe.seed)
    config = adapter_config(recipe, model, parts)
    for note in _left_out(recipe, config, model, task):
        parts.notes.append(note)
        _say(console, note)
    collate = task.collator(tokenizer, 1 if args.device.type == "cpu" else 8, recipe.seed)
    try:
        initial.prepare(model, config, task, plan.train, collate, args, console is not None)
        model = get_peft_model(model, config)
        initial.initialise(model, config, plan.train, collate, args, console is not None)
    except ValueError as error:
        raise recipe.error("adapter", problem=str(error)) from error
    return model, collate


def _left_out(recipe: Recipe, config: Any, model: Any, task: Any) -> list[str]:
    from veneer.train.idle import leave_out_idle

    try:
        return leave_out_idle(recipe, config, model, task)
    except RecipeError:
        raise
    except ValueError as error:
        raise recipe.error("adapter", problem=str(error)) from error


def _run(recipe: Recipe, parts: Parts, trainer: TaskTrainer, now: Attempt, console: Console | None) -> float:
    """Train, from the last checkpoint on if there is one; the seconds, those of earlier attempts included."""
    from veneer.train.checkpoints import Autosave
    from veneer.train.faster import faster_base

    args = trainer.args
    if now.automatic:
        trainer.add_callback(Autosave())
        args.save_total_limit = 2
    start = time.monotonic()
    with faster_base(recipe, parts, trainer, lambda text: _say(console, text)):
        args.restore_callback_states_from_checkpoint = now.last is not None
        trainer.train(resume_from_checkpoint=None if now.last is None else str(now.last))
    return time.monotonic() - start + trainer.earlier.seconds


def _pad(model: Any, tokenizer: Any, parts: Parts, console: Console | None) -> None:
    generation = getattr(model, "generation_config", None)  # a model without a decoder has none
    own = None if generation is None else generation.eos_token_id
    stops = {*parts.plan.stop_ids, *(own if isinstance(own, list) else [own])}
    note = safe_pad(tokenizer, {token for token in stops if token is not None})
    model.config.pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    if note is not None:
        parts.notes.append(note)
        _say(console, note)


def _measure(recipe: Recipe, parts: Parts, model: Any, tokenizer: Any, console: Console | None, what: str) -> Outcome:
    if parts.plan.test is None:
        return Outcome({}, [], [])
    _say(console, f"Measuring {what} on {len(parts.plan.test)} test rows.")
    with processes.sharing():
        return parts.task.evaluate(model, tokenizer, parts.plan, recipe)


def _trainer(
    recipe: Recipe, parts: Parts, model: Any, tokenizer: Any, collate: Any, callbacks: Sequence[TrainerCallback]
) -> TaskTrainer:
    from veneer.train.custom_loss import custom_loss
    from veneer.train.memory import memory_options
    from veneer.train.optimizer import optimizer_options
    from veneer.train.stopping import stopping
    from veneer.train.trainer import TaskTrainer

    return TaskTrainer(
        task=parts.task,
        measure=lambda: _measure(recipe, parts, model, tokenizer, None, ""),
        shown=parts.plan.examples[: recipe.eval.samples],
        optimizer_options=optimizer_options(recipe.train),
        memory=memory_options(recipe.train),
        model=model,
        args=parts.args,
        train_dataset=parts.plan.train if parts.plan.stream is None else parts.plan.stream,
        eval_dataset=parts.plan.test,
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=[*callbacks, *stopping(recipe)],
        loss=custom_loss(recipe),
    )


def _samples(recipe: Recipe, plan: Plan, before: Outcome, after: Outcome) -> list[Sample]:
    return [
        Sample(
            prompt=prompt,
            expected=expected,
            base=before.outputs[row],
            tuned=after.outputs[row],
            base_ok=before.correct[row],
            tuned_ok=after.correct[row],
        )
        for row, (prompt, expected) in enumerate(plan.examples[: recipe.eval.samples])
    ]


def _save_adapter(recipe: Recipe, model: Any, tokenizer: Any, plan: Plan, folder: Path) -> None:
    """The adapter, its tokenizer, and what use must know: the task, the labels, how answers were asked for."""
    import json

    from veneer.train.asking import write_asking

    adapter = folder / "adapter"
    model.save_pretrained(str(adapter))
    tokenizer.save_pretrained(str(adapter))
    write_purpose(purpose_of(recipe, plan), adapter)
    if plan.label_names is not None:
        labels = json.dumps(plan.label_names, ensure_ascii=False)
        (adapter / "labels.json").write_text(labels + "\n", encoding="utf-8")
    if plan.asking is not None:
        write_asking(plan.asking, adapter)
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def _merge(recipe: Recipe, model: Any, tokenizer: Any, folder: Path, parts: Parts, console: Console | None) -> bool:
    """Write `merged/` if asked for; a method without a merged form costs a note, not the trained adapter."""
    if not recipe.merge:
        return False
    if recipe.base.quantize is not None:
        return _merge_into_original(folder, parts, console)
    try:
        merged = model.merge_and_unload()
    except (NotImplementedError, ValueError) as error:
        parts.notes.append(f"Not merged: {error}")
        _say(console, parts.notes[-1])
        return False
    with quiet():
        merged.save_pretrained(str(folder / "merged"))
    tokenizer.save_pretrained(str(folder / "merged"))
    write_purpose(purpose_of(recipe, parts.plan), folder / "merged")
    return True


def _merge_into_original(folder: Path, parts: Parts, console: Console | None) -> bool:
    """As `_merge` for a base that was quantised to train on: into its files' own weights, which lose nothing."""
    from veneer.export.merging import merge_to_folder

    try:
        merge_to_folder(str(folder / "adapter"), folder / "merged")
    except (NotImplementedError, ValueError) as error:
        parts.notes.append(f"Not merged: {error}")
        _say(console, parts.notes[-1])
        return False
    return True
