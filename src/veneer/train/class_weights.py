"""Weights of labels in a loss: `options: {class_weights: balanced}`, or a weight for each label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from veneer.train.errors import nearest

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

__all__ = ["Asked", "label_weights"]

Asked = Literal["balanced"] | dict[str, float] | None


def label_weights(
    recipe: Recipe, asked: Asked, labels: Iterable[str], names: Sequence[str], rows: int | None = None
) -> dict[str, float]:
    """The weight of each label, empty where none are asked for.

    ``labels`` are those of all training rows, one after the other. `balanced` gives each label the same share of the
    loss, n / (kinds * count); where a row has any number of labels, of ``rows`` in all, each label's rows with it weigh
    as much as those without it, (rows - count) / count.

    Raises:
        RecipeError: a weight for a label that no row has, or one below zero.
    """
    if asked == "balanced":
        counts = Counter(labels)
        if rows is not None:
            return {name: max(rows - count, 1) / count for name, count in counts.items()}
        return {name: counts.total() / (len(counts) * count) for name, count in counts.items()}
    for name, weight in (asked or {}).items():
        if name not in names:
            near, hint = nearest(name, names), f"The labels are {', '.join(names)}."
            problem = f"no row has the label {name!r}"
            raise recipe.error("options", "class_weights", problem=problem, near=near, hint=hint)
        if weight < 0:
            raise recipe.error("options", "class_weights", problem=f"the weight of {name!r} is {weight:g}, below 0")
    return {} if asked is None else {name: float(asked.get(name, 1.0)) for name in names}
