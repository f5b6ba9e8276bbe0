"""What makes a training step faster without the model's files knowing: kernels, int8 products, memory, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from veneer.train.allocator import keep_blocks, return_blocks
from veneer.train.prepare import Parts
from veneer.train.recipe import Recipe

if TYPE_CHECKING:
    from veneer.train.trainer import TaskTrainer

__all__ = ["faster_base"]


@contextmanager
def faster_base(recipe: Recipe, parts: Parts, trainer: TaskTrainer, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the base does its work as the recipe's `base` section says; after it, as before. Batches are laid out
    as the task knows to for this model.

    Where `base.matmul: int8` gains nothing here, the floats stay and a note says so.
    """
    from veneer.fused import base_kernels

    model, collate, memory = trainer.accelerator.unwrap_model(trainer.model), trainer.data_collator, trainer.memory
    if parts.args.device.type == "cpu":
        _ = return_blocks() if memory.return_memory else keep_blocks()
    with ExitStack() as stack:
        if recipe.base.kernels:
            found = stack.enter_context(base_kernels(model, memory.mlp_checkpointing))
            if memory.mlp_checkpointing and not found.gates:
                parts.notes.append("`train.mlp_checkpointing` has no effect: this base has no gated feed-forward part.")
                say(parts.notes[-1])
        if recipe.base.matmul == "int8":
            stack.enter_context(_int8(parts, model, collate, say))
        trainer.batch_form = stack.enter_context(parts.task.batch_form(model, parts.plan, collate))
        yield
    trainer.batch_form = None


@contextmanager
def _int8(parts: Parts, model: Any, collate: Any, say: Callable[[str], None]) -> Iterator[None]:
    from veneer.int8 import int8_base, int8_is_faster

    if parts.args.device.type != "cpu" or not int8_is_faster():
        parts.notes.append("`base.matmul: int8` is left out: this machine multiplies floats as fast.")
        say(parts.notes[-1])
        yield
        return
    rows, inputs = parts.plan.train, {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    runs: list[Callable[[], Any]] = []
    for first in (0, len(rows) // 2):
        features = [rows[place] for place in range(first, min(first + 8, len(rows)))]
        batch = {name: value for name, value in collate(features).items() if name in inputs}
        runs.append(partial(model, **batch))
    found = int8_base(model, runs)
    worst = max(found.errors.values(), default=0.0)
    say(f"{len(found.weights)} frozen layers multiply in int8; the largest relative error of one is {worst:.1%}.")
    with found:
        yield
