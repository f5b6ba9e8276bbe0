"""Rows of several sources: which are held out, in which order the others come, and how many came from where."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Group", "describe", "hold_out", "mix", "shares"]

Stopping = Literal["all_exhausted", "first_exhausted"]


@dataclass(frozen=True)
class Group:
    """The rows of one source, by their numbers in the table of all sources."""

    name: str
    rows: list[int]
    weight: float | None = None


def shares(weights: Sequence[float | None]) -> list[float] | None:
    """How often each source is drawn from; None where no weight is given. A source without one weighs 1."""
    if all(weight is None for weight in weights):
        return None
    given = [1.0 if weight is None else weight for weight in weights]
    return [weight / sum(given) for weight in given]


def hold_out(group: Group, share: float, seed: int) -> tuple[Group, list[int]]:
    """A source without a random share of its rows, and these.

    Raises:
        ValueError: one of the two would be empty.
    """
    number = round(len(group.rows) * share)
    if not 0 < number < len(group.rows):
        raise ValueError(f"a share of {share} of {len(group.rows)} rows leaves one part empty")
    order = list(range(len(group.rows)))
    random.Random(seed).shuffle(order)
    kept, held = sorted(order[number:]), sorted(order[:number])
    return replace(group, rows=[group.rows[place] for place in kept]), [group.rows[place] for place in held]


def mix(groups: Sequence[Group], stopping: Stopping, seed: int) -> list[int]:
    """The order of rows: one source after the other, or, with weights, drawn at random from all.

    `all_exhausted` goes on until each row has come at least once, so small sources repeat; `first_exhausted` ends with
    the first source that is used up, so no row repeats.
    """
    import datasets

    probabilities = shares([group.weight for group in groups])
    if probabilities is None or len(groups) == 1:
        return [row for group in groups for row in group.rows]
    sources = [datasets.Dataset.from_dict({"row": group.rows}) for group in groups]
    drawn = datasets.interleave_datasets(sources, probabilities=probabilities, seed=seed, stopping_strategy=stopping)
    return list(drawn["row"])


def describe(groups: Sequence[Group], order: Sequence[int]) -> list[str]:
    """One sentence: how many rows came from each of several sources, and how often."""
    if len(groups) < 2:
        return []
    count = Counter(order)
    parts = []
    for group in groups:
        came, used = sum(count[row] for row in group.rows), sum(row in count for row in group.rows)
        of = f"of {len(group.rows):,}" if used < len(group.rows) else "all"
        times = f", {came / used:.1f} times each" if used and came > used else ""
        parts.append(f"{group.name} {came:,} ({came / max(len(order), 1):.0%}; {of}{times})")
    return [f"{len(order):,} training rows from {len(groups)} sources: {', '.join(parts)}."]
