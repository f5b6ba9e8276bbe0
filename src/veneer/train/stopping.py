"""Early stopping, from a recipe: `train: {early_stopping_patience: 3}` ends a run that gets no better."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from veneer.train.recipe import Recipe

__all__ = ["StopOptions", "check_stopping", "stopping", "without_stopping"]


@dataclass
class StopOptions:
    """early_stopping_patience: how many evaluations in a row may be no better than the best before a run ends.
    early_stopping_threshold: by how much the score must be better to count. The score is `metric_for_best_model`, the
    loss unless it is given."""

    early_stopping_patience: int | None = None
    early_stopping_threshold: float | int = 0.0


def without_stopping(train: dict[str, Any]) -> dict[str, Any]:
    """The rest of the section; the score to watch is the loss unless it names one."""
    names = {f.name for f in fields(StopOptions)}
    rest = {key: value for key, value in train.items() if key not in names}
    return rest if rest == train else {"metric_for_best_model": "loss", **rest}


def check_stopping(recipe: Recipe) -> None:
    """Raise RecipeError where nothing would be evaluated, or patience is no number of evaluations."""
    patience = recipe.train.get("early_stopping_patience")
    if patience is None:
        if "early_stopping_threshold" in recipe.train:
            problem = "read with `early_stopping_patience` only"
            raise recipe.error("train", "early_stopping_threshold", problem=problem)
        return
    if patience < 1:
        raise recipe.error("train", "early_stopping_patience", problem=f"must be at least 1, got {patience}")
    if recipe.train.get("eval_strategy", "no") == "no":
        hint = "Say when to evaluate, for example `train: {eval_strategy: steps, eval_steps: 100}`."
        raise recipe.error("train", "early_stopping_patience", problem="nothing is evaluated in training", hint=hint)


def stopping(recipe: Recipe) -> list[TrainerCallback]:
    """What ends the run early, if the recipe asks for it."""
    from transformers import EarlyStoppingCallback

    patience = recipe.train.get("early_stopping_patience")
    if patience is None:
        return []
    return [EarlyStoppingCallback(patience, float(recipe.train.get("early_stopping_threshold", 0.0)))]
