"""What a task is: from checked rows to labelled tokens, from a batch to a loss, from a model to a score."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from datasets import Dataset

    from veneer.train.asking import Asking
    from veneer.train.data import Layout, Table
    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe
    from veneer.train.stream import Stream
    from veneer.train.use import Loaded

__all__ = ["NoOptions", "Outcome", "Plan", "Task", "predict_logits", "prompt_problem", "text_problem", "token_limit"]


@dataclass
class Plan:
    """The rows of a run as tokens; where they are streamed, ``train`` are the first of ``stream``.

    ``train`` and ``test`` hold `input_ids` (or several columns that end so), `labels` (-100 where nothing is
    learned) and `length` (tokens); ``examples`` the test rows as text, (prompt, expected); ``targets`` what
    `Task.evaluate` compares with; ``stop_ids`` the tokens that end an answer; ``model_options`` what the
    model's config is given; ``facts`` what use of the adapter must know beside,
    ``asking`` how answers were asked for; ``notes`` what the user should know.
    """

    train: Dataset
    stream: Stream | None = None
    test: Dataset | None = None
    label_names: list[str] | None = None
    examples: list[tuple[str, str]] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)
    model_options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    asking: Asking | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """A model's scores on the test rows (0 to 1 unless a name says otherwise), and its answer to each."""

    metrics: dict[str, float]
    outputs: list[str]
    correct: list[bool]


@dataclass
class NoOptions:
    """The options of a task that has none."""


class Task:
    """One kind of training job. What it learns from the data is in its Plan; it keeps only its options.

    ``layouts`` are the sets of columns (roles) that a row may have, the fullest first, and ``asks`` those of a row
    that is to be predicted; ``aliases`` further names
    under which a role's column is found. ``metrics`` are the choices of `eval.metric`.
    """

    name: ClassVar[str]
    #: peft's name for it, None where peft has none
    task_type: ClassVar[str | None]
    auto_class: ClassVar[str]
    #: the hub's name for what it does
    pipeline: ClassVar[str]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]
    asks: ClassVar[tuple[tuple[str, ...], ...]]
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {}
    train_defaults: ClassVar[dict[str, Any]]
    metrics: ClassVar[tuple[str, ...]] = ("auto",)
    Options: ClassVar[type] = NoOptions
    #: rows of one run may have different ones of its layouts
    mixes: ClassVar[bool] = False
    #: the columns of a batch that its loss needs
    label_columns: ClassVar[tuple[str, ...]] = ("labels",)
    #: the tokenizer is given lists of words
    whole_words: ClassVar[bool] = False
    #: a label is predicted from the place before it
    predicts_next: ClassVar[bool] = False
    #: its answers are labels with names (unless its config has `num_labels`)
    named_labels: ClassVar[bool] = False
    #: it answers in free text, and can chat
    writes: ClassVar[bool] = False
    #: the loss is a cross entropy over labels, which `train.label_smoothing_factor` can smooth
    smooths: ClassVar[bool] = True
    #: its source and target may be two languages of one `translation` column
    translates: ClassVar[bool] = False
    #: a head that the base lacks may start from random values
    new_head: ClassVar[bool] = True

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row (under its role names), or an empty string."""
        raise NotImplementedError

    def check_ask(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row that is to be predicted, or an empty string."""
        return text_problem(layout, row, *layout.columns)

    def plan(self, recipe: Recipe, train: Table, test: Table | None, tokenizer: Any, config: Any) -> Plan:
        """Tokens and labels of every row.

        Raises:
            DataError: rows that cannot be trained on, by file and row.
        """
        from veneer.train.token_cache import kept_plan

        make = lambda: self.plan_train(recipe, train, tokenizer, config)
        plan = kept_plan(recipe, train, tokenizer, config, make)
        if test is not None:
            limit = recipe.eval.limit
            few = test if limit is None else test.select(range(min(limit, len(test))))
            self.plan_test(plan, recipe, few, tokenizer, config)
        return plan

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Tokens and labels of the training rows, and what they say about the labels. Raises DataError."""
        raise NotImplementedError

    def row_warnings(self, recipe: Recipe, plan: Plan, train: Table, test: Table | None) -> list[str]:
        """What is odd about the rows in the task's own eyes."""
        return []

    def more_rows(self, plan: Plan, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Dataset:
        """Tokens and labels of further training rows, read as the plan's were. Raises DataError."""
        return self.plan_train(recipe, train, tokenizer, config).train

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Add the test rows to a plan, which may have no training rows. Raises DataError."""
        raise NotImplementedError

    def collator(
        self, tokenizer: Any, multiple_of: int = 1, seed: int = 0
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of the plan's rows; ``seed`` is for what it draws."""
        from veneer.train.collate import Collator

        return Collator(tokenizer.pad_token_id, multiple_of)

    def check_model(self, model: torch.nn.Module, plan: Plan) -> None:
        """Look at the loaded base before anything is trained.

        Raises:
            BaseModelError: it cannot do what the plan needs.
        """

    @contextmanager
    def batch_form(self, model: Any, plan: Plan, collate: Any) -> Iterator[Callable[[Any], Any] | None]:
        """Inside, ``model`` takes training batches in a form that is less work: yields what makes it, if any does."""
        yield None

    def begin_epoch(self, collate: Any, epoch: int) -> None:
        """Tell the collator which pass over the rows begins, where what it draws depends on it."""

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A tensor whose entries other than -100 are what the loss of a batch is a mean over."""
        return batch["labels"][:, 1:] if self.predicts_next else batch["labels"]

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The loss of a batch: its items' mean, or their sum divided by ``items``."""
        raise NotImplementedError

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores of a batch's labels, (rows, length, labels), for a smoothed loss."""
        rest = {key: value for key, value in batch.items() if key != "labels"}
        # a prompt method's virtual tokens come first and have no label
        return model(**rest).logits[:, -batch["labels"].shape[1] :]

    def read(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What of the model's outputs the loss is made of, perhaps with some that follow from the same."""
        import torch

        return [out for out in model(**batch).to_tuple() if isinstance(out, torch.Tensor) and out.is_floating_point()]

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """A loss of a batch of that shape on tensors without data, which needs what training's loss needs.

        ``labelled`` is the share of tokens with a label.
        """
        from veneer.train.meta_loss import outputs_loss

        return outputs_loss(model, rows, tokens)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """Score a model on the plan's test rows."""
        raise NotImplementedError

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """The answer to each row, as plain values; a row cut to the model's length has `cut: true`."""
        raise NotImplementedError


def token_limit(recipe: Recipe, tokenizer: Any, config: Any) -> int:
    """The most tokens of a row: the recipe's, and what the tokenizer and the model can take."""
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else 1 << 30
    return min(recipe.data.max_length, tokenizer.model_max_length, positions)


def text_problem(layout: Layout, row: dict[str, Any], *roles: str) -> str:
    """What is wrong with the values that must be text, or an empty string."""
    for role in roles:
        value = row.get(role)
        if role in layout.columns and not (isinstance(value, str) and value.strip()):
            what = "is empty" if isinstance(value, str) else f"is {type(value).__name__}, expected text"
            return f"{layout.columns[role]!r} {what}"
    return ""


def prompt_problem(layout: Layout, row: dict[str, Any]) -> str:
    """What is wrong with a prompt or the turns of a conversation, or an empty string."""
    for role, column in layout.columns.items():
        turns = row[role]
        if role != "messages" and not isinstance(turns, list):
            return text_problem(layout, row, role)
        good = isinstance(turns, list) and all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns)
        if not turns or not good:
            return f"{column!r} is not a list of {{role, content}} objects"
    return ""


def predict_logits(
    loaded: Loaded, table: Table, recipe: Recipe, roles: Sequence[str], score: Callable[[Any, Any], torch.Tensor]
) -> list[tuple[torch.Tensor, bool]]:
    """What ``score(model, batch)`` gives for each row of one text or two, and whether the row was cut."""
    import datasets

    from veneer.train.collate import Collator, batches
    from veneer.train.generate import evaluating
    from veneer.train.tokens import encode_texts

    limit = token_limit(recipe, loaded.tokenizer, loaded.model.config)
    columns, cut = encode_texts(table, loaded.tokenizer, roles, limit)
    rows, collate = datasets.Dataset.from_dict(columns), Collator(loaded.tokenizer.pad_token_id)
    device = next(loaded.model.parameters()).device
    out: list[Any] = [None] * len(table)
    with evaluating(loaded.model):
        for part, batch in batches(rows, collate, recipe.eval.batch_size, device):
            for number, row in zip(part, score(loaded.model, batch).float().cpu(), strict=True):
                out[number] = row
    return list(zip(out, cut, strict=True))
