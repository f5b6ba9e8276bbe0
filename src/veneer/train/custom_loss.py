"""A loss of the user's own, named in a recipe.

train: {loss: my_losses.focal}

    def focal(outputs, labels, num_items_in_batch=None): ...      # in my_losses.py, beside the recipe's command

It is called as transformers' `compute_loss_func` is: `outputs.logits` are the scores of a batch, (rows, length, labels)
or (rows, labels); `labels` have -100 where nothing is learned, and those of a language model are not shifted (scores at
one place are for the label at the next). `num_items_in_batch` is the number of labels, of the whole step in training
and of the batch in evaluation, by which a sum is to be divided.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.errors import nearest

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

__all__ = ["CustomLoss", "LossOptions", "custom_loss", "without_loss"]

CustomLoss = Callable[..., Any]


@dataclass
class LossOptions:
    """loss: the dotted name of a function of (outputs, labels, num_items_in_batch=None) in place of the task's."""

    loss: str | None = None


def without_loss(train: dict[str, Any]) -> dict[str, Any]:
    """The rest of the section."""
    return {key: value for key, value in train.items() if key != "loss"}


def custom_loss(recipe: Recipe) -> CustomLoss | None:
    """The function that `train.loss` names, None where it names none.

    Raises:
        RecipeError: no such module or function, one that cannot be called so, or a task that has no such labels.
    """
    from veneer.train.tasks import task_class

    name = recipe.train.get("loss")
    if name is None:
        return None
    if not task_class(recipe.task).smooths:
        problem = f"{recipe.task} compares answers or texts, and has no scores with labels to give to a loss"
        raise recipe.error("train", "loss", problem=problem, hint="Leave it out; `options` may have what you look for.")
    for other, value in (("label_smoothing_factor", recipe.train.get("label_smoothing_factor")),
                         ("class_weights", recipe.options.get("class_weights"))):  # fmt: skip
        if value:
            problem = f"given beside `{other}`, which belongs to the task's own loss"
            raise recipe.error("train", "loss", problem=problem, hint="Keep one of the two.")
    return _find(recipe, name)


def _find(recipe: Recipe, name: str) -> CustomLoss:
    module, _, function = name.rpartition(".")
    if not module:
        hint = "Write the file and the function in it, for example `my_losses.focal` of my_losses.py."
        raise recipe.error("train", "loss", problem=f"{name!r} is not a dotted name", hint=hint)
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        hint = f"Modules are looked for in {here} and among those that are installed."
        raise recipe.error("train", "loss", problem=f"{name}: {error}", hint=hint) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        known = [key for key, value in vars(sys.modules[module]).items() if callable(value) and not key.startswith("_")]
        problem = f"{module} has no function {function!r}"
        raise recipe.error("train", "loss", problem=problem, near=nearest(function, known))
    try:
        inspect.signature(found).bind(None, None, num_items_in_batch=None)
    except TypeError as error:
        hint = f"Write `def {function}(outputs, labels, num_items_in_batch=None):`."
        raise recipe.error("train", "loss", problem=f"{name} cannot be called: {error}", hint=hint) from error
    loss: CustomLoss = found
    return loss
