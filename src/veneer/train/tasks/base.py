"""What a task is: from checked rows to labelled tokens, from a batch to a loss, from a model to a score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from veneer.train.data import Layout, Table
    from veneer.train.recipe import Recipe

__all__ = ["Outcome", "Plan", "Task"]


@dataclass
class Plan:
    """The rows of a run as tokens.

    ``train`` and ``test`` hold `input_ids`, `labels` (-100 where nothing is learned) and `length` (tokens);
    ``examples`` the test rows as text, (prompt, expected); ``targets`` what `Task.evaluate` compares with;
    ``stop_ids`` the tokens that end an answer; ``notes`` what the user should know.
    """

    train: Dataset
    test: Dataset | None = None
    label_names: list[str] | None = None
    examples: list[tuple[str, str]] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """A model's scores on the test rows (0 to 1 unless a name says otherwise), and its answer to each."""

    metrics: dict[str, float]
    outputs: list[str]
    correct: list[bool]


class Task(Protocol):
    """One kind of training job. A task keeps no state: all that it learns from the data is in its Plan."""

    name: ClassVar[str]
    task_type: ClassVar[str]
    auto_class: ClassVar[str]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]
    train_defaults: ClassVar[dict[str, Any]]
    #: the tokenizer is given lists of words
    whole_words: ClassVar[bool]
    #: a label is predicted from the place before it
    predicts_next: ClassVar[bool]

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row (under its role names), or an empty string."""

    def plan(self, recipe: Recipe, train: Table, test: Table | None, tokenizer: Any, config: Any) -> Plan:
        """Tokens and labels of every row.

        Raises:
            DataError: rows that cannot be trained on, by file and row.
        """

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The loss of a batch: its labels' mean, or their sum divided by ``items``."""

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """Score a model on the plan's test rows."""
