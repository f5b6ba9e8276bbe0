"""`seq-cls`: a label, a set of labels or a number for one sentence or two."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from veneer.train import label_scores
from veneer.train.class_weights import Asked, label_weights
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE
from veneer.train.errors import DataError, nearest
from veneer.train.processes import merged, summed
from veneer.train.tasks.base import Outcome, Plan, Task, predict_logits, text_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["SeqCls", "SeqClsOptions"]

SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"


@dataclass
class SeqClsOptions:
    """problem_type: what a label is; None reads it off the rows (a list: several, a number with a point: a
    number). separator: what parts several labels in one text. threshold: from which probability one of several
    labels is given. class_weights: `balanced` weighs a row by how rare its label is, or weights by label; of
    several labels a row, each label's rows with it (a `pos_weight`).
    """

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    separator: str | None = None
    threshold: float = 0.5
    class_weights: Asked = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
        if self.separator is not None and self.problem_type not in (None, MULTI):
            raise ValueError(f"separator parts several labels, and problem_type is {self.problem_type}")
        if self.class_weights is not None and self.problem_type == NUMBER:
            raise ValueError("class_weights are for labels, and problem_type is regression")


class SeqCls(Task):
    """Labels of whole texts; a new classification head is trained and saved with the adapter."""

    name: ClassVar[str] = "seq-cls"
    task_type: ClassVar[str] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "text_pair", "label"), ("text", "label"))
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("sentence", "sentence1", "premise"),
        "text_pair": ("sentence2", "hypothesis"),
        "label": ("labels", "score"),
    }
    pipeline: ClassVar[str] = "text-classification"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-4, "per_device_train_batch_size": 16}
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "text_pair"), ("text",))
    named_labels: ClassVar[bool] = True
    Options: ClassVar[type] = SeqClsOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        value, column = row["label"], layout.columns["label"]
        if isinstance(value, list):
            if len(set(map(str, value))) < len(value) and all(item in (0, 1) for item in value):
                return f"{column!r} is {value}: list the labels that a row has, not a 0 or 1 for each"
            odd = next((item for item in value if not isinstance(item, str | int)), None)
            if odd is not None:
                return f"{column!r} holds {odd!r}, expected labels in text or whole numbers"
        elif isinstance(value, float) and not math.isfinite(value):
            return f"{column!r} is {value}, expected a finite number"
        elif not isinstance(value, str | int | float):
            return f"{column!r} is {value!r}, expected a label, a list of labels or a number"
        return text_problem(layout, row, "text", "text_pair")

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """The kind of label and the labels found in training, and the tokens and labels of every row."""
        kind = self._kind(train)
        if kind != SINGLE and recipe.train.get("label_smoothing_factor"):
            problem = f"smooths one label a row, and the rows' problem_type is {kind}"
            raise recipe.error("train", "label_smoothing_factor", problem=problem, hint="Leave it out.")
        if kind == NUMBER and self.options.class_weights is not None:
            hint = "Leave it out, or set `options.problem_type`."
            raise recipe.error("options", "class_weights", problem="the rows' labels are numbers to learn", hint=hint)
        limit = token_limit(recipe, tokenizer, config)
        labels = self._labels(train, kind)
        names = None if kind == NUMBER else _label_names(labels, config)
        weights: dict[str, float] = {}
        if names is not None:
            several = kind == MULTI
            flat = [name for label in labels for name in label] if several else labels
            weights = label_weights(recipe, self.options.class_weights, flat, names, len(train) if several else None)
        dataset, cut = self._encode(train, kind, names, tokenizer, limit, weights)
        size = {"num_labels": 1} if names is None else {}
        plan = Plan(train=dataset, label_names=names, model_options={"problem_type": kind, **size})
        if cut:
            plan.notes.append(f"{cut} of {len(train)} training rows are cut to {limit} tokens.")
        plan.notes += _look_alike(names or ())
        if kind == NUMBER and isinstance(train.dataset[0]["label"], str) and self.options.problem_type is None:
            plan.notes.append("The labels are decimal numbers, learned as such; see `options.problem_type`.")
        plan.facts["pair"] = "text_pair" in train.layout.columns
        return plan

    def more_rows(self, plan: Plan, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Any:
        """Tokens and labels under the plan's label names."""
        kind, names, limit = (
            plan.model_options["problem_type"],
            plan.label_names,
            token_limit(recipe, tokenizer, config),
        )
        weights = {} if names is None else label_weights(recipe, self.options.class_weights, [], names)
        return self._encode(train, kind, names, tokenizer, limit, weights)[0]

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Tokens and labels of the test rows."""
        pair = "text_pair" in test.layout.columns
        if plan.facts.get("pair", pair) != pair:
            has, other = ("no second text", "have one") if not pair else ("a second text", "have none")
            hint = "Give both the same columns; `data.columns` says which they are."
            raise DataError(f"the test rows have {has}, and the training rows {other}", file=test.path, hint=hint)
        limit, kind, names = (
            token_limit(recipe, tokenizer, config),
            plan.model_options["problem_type"],
            plan.label_names,
        )
        plan.test, cut = self._encode(test, kind, names, tokenizer, limit, {})
        if cut:
            plan.notes.append(f"{cut} of {len(test)} test rows are cut to {limit} tokens.")
        pairs = zip(_texts(test), self._labels(test, kind), strict=True)
        plan.examples = [(" | ".join(text), _shown(label)) for text, label in pairs]

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """Cross entropy of one label, binary cross entropy of several, squared error of a number."""
        import torch.nn.functional as F

        labels = batch["labels"]
        logits = self.logits(model, batch)
        if labels.dim() == 2:
            each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
            each = (each * batch["weight"] if "weight" in batch else each).flatten()
        elif labels.is_floating_point():
            each = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        else:
            each = F.cross_entropy(logits, labels, reduction="none")
            each = each * batch["weight"] if "weight" in batch else each
        return each.sum() / (labels.numel() if items is None else items)

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores of every label, (rows, labels)."""
        return model(**{key: value for key, value in batch.items() if key not in ("labels", "weight")}).logits

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """The labels of the test rows, scored as their kind is."""
        import torch

        from veneer.train.collate import batches
        from veneer.train.generate import evaluating

        assert plan.test is not None
        device = next(model.parameters()).device
        rows: list[Any] = [None] * len(plan.test)
        total = 0.0
        with evaluating(model):
            for part, batch in batches(plan.test, self.collator(tokenizer), recipe.eval.batch_size, device):
                total += float(self.loss(model, batch, torch.ones((), device=device)))
                for number, row in zip(part, self.logits(model, batch).float().tolist(), strict=True):
                    rows[number] = row
        logits, [total] = torch.tensor(merged(rows)), summed(total)
        wanted = plan.test["labels"][:]
        scores, found = self._score(plan, torch.tensor(wanted), logits)
        items = logits.numel() if plan.model_options["problem_type"] == MULTI else len(rows)
        right = [_shown(label) == want for label, (_, want) in zip(found, plan.examples, strict=True)]
        return Outcome(scores | {"loss": total / items}, [_shown(label) for label in found], right)

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`label`, `score` and every label's share in `scores`; `labels` where there may be several; or `value`."""
        config = loaded.model.config
        rows = predict_logits(loaded, table, recipe, ("text", "text_pair"), self.logits)
        answers: list[dict[str, Any]] = []
        for logits, cut in rows:
            if config.problem_type == NUMBER:
                answer: dict[str, Any] = {"value": float(logits[0])}
            else:
                several = config.problem_type == MULTI
                shares = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
                scores = dict(zip(loaded.label_names, shares, strict=True))
                [found] = self.decide(config.problem_type or SINGLE, loaded.label_names, logits[None])
                answer = {"labels": found} if several else {"label": found, "score": scores[found]}
                answer["scores"] = scores
            answers.append(answer | ({"cut": True} if cut else {}))
        return answers

    def _score(self, plan: Plan, wanted: torch.Tensor, logits: torch.Tensor) -> tuple[dict[str, float], list[Any]]:
        kind, names = plan.model_options["problem_type"], plan.label_names
        found = self.decide(kind, names, logits)
        if kind == NUMBER:
            return label_scores.number_scores(wanted, logits.squeeze(-1)), found
        assert names is not None
        if kind == MULTI:
            return label_scores.set_scores(wanted, logits.sigmoid() >= self.options.threshold), found
        return label_scores.class_scores(wanted, logits.argmax(-1), len(names)), found

    def decide(self, kind: str, names: Sequence[str] | None, logits: torch.Tensor) -> list[Any]:
        """The answer for each row of scores: a label, a list of labels, or a number."""
        if kind == NUMBER or names is None:
            return logits.squeeze(-1).tolist()
        if kind == MULTI:
            chosen = (logits.sigmoid() >= self.options.threshold).tolist()
            return [[name for name, yes in zip(names, row, strict=True) if yes] for row in chosen]
        return [names[best] for best in logits.argmax(-1).tolist()]

    def _kind(self, train: Table) -> str:
        labels = train.dataset["label"][:]
        if self.options.problem_type is not None:
            return self.options.problem_type
        if self.options.separator is not None or isinstance(labels[0], list):
            return MULTI
        if isinstance(labels[0], str) and _are_decimals(labels):  # in a CSV file every value is text
            return NUMBER
        return NUMBER if isinstance(labels[0], float) else SINGLE

    def _labels(self, table: Table, kind: str) -> list[Any]:
        """Each row's label as its kind wants it: text, a list of texts, or a number."""
        out: list[Any] = []
        for row, value in enumerate(table.dataset["label"][:]):
            if kind == NUMBER:
                out.append(_number(table, row, value))
            elif kind == MULTI:
                cut = (
                    value.split(self.options.separator) if isinstance(value, str) and self.options.separator else value
                )
                parts = cut if isinstance(cut, list) else [cut]
                out.append(sorted({_name(part) for part in parts if _name(part)}))
            elif isinstance(value, list):
                hint = "Set `options.problem_type: multi_label_classification`."
                raise table.error(row, f"several labels, {value!r}, where others have one", hint)
            elif not _name(value):  # of several labels in a text it is none
                name = table.layout.columns["label"]
                raise table.error(row, f"{name!r} is {value!r}, expected a label, a list of labels or a number")
            else:
                out.append(_name(value))
        return out

    def _encode(
        self,
        table: Table,
        kind: str,
        names: Sequence[str] | None,
        tokenizer: Any,
        limit: int,
        weights: dict[str, float],
    ) -> tuple[Any, int]:
        import datasets

        from veneer.train.tokens import encode_texts

        columns, cut = encode_texts(table, tokenizer, ("text", "text_pair"), limit)
        labels = self._labels(table, kind)
        if names is None:
            columns["labels"] = labels
        else:
            index = {name: number for number, name in enumerate(names)}
            for row, label in enumerate(labels):
                _check_label(table, row, label if isinstance(label, list) else [label], index)
            one = lambda label: [float(name in label) for name in names] if kind == MULTI else index[label]
            columns["labels"] = [one(label) for label in labels]
        if weights:
            # of several labels, those that a row has; what it has not counts as ever
            weigh = lambda label: [weights[n] if n in label else 1.0 for n in names or ()]
            columns["weight"] = [weigh(label) if kind == MULTI else weights[label] for label in labels]
        return datasets.Dataset.from_dict(columns), sum(cut)


def _are_decimals(labels: Sequence[Any]) -> bool:
    """Whether all labels are numbers in text, not all of them whole ones."""
    return any("." in label for label in labels) and all(re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", x) for x in labels)


def _look_alike(names: Sequence[str]) -> list[str]:
    """What is said of labels that differ in case alone."""
    first: dict[str, str] = {}
    same = [(first[name.lower()], name) for name in names if first.setdefault(name.lower(), name) != name]
    return [f"The labels {a!r} and {b!r} differ in case alone, and are learned as two." for a, b in same]


def _texts(table: Table) -> list[tuple[str, ...]]:
    roles = [role for role in ("text", "text_pair") if role in table.layout.columns]
    return list(zip(*(table.dataset[role][:] for role in roles), strict=True))


def _name(value: Any) -> str:
    return str(value).strip().lower() if isinstance(value, bool) else str(value).strip()


def _number(table: Table, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise table.error(row, f"label {value!r} is not a number", "Or set `options.problem_type`.") from None
    if number == IGNORE or not math.isfinite(number):
        raise table.error(row, f"label {value!r} cannot be learned", "Scale the numbers, for example to 0 to 1.")
    return number


def _label_names(labels: Sequence[Any], config: Any) -> list[str]:
    """The labels of the training rows, numbers in their order; a base with the same labels keeps its own order."""
    found = {name for label in labels for name in (label if isinstance(label, list) else [label])}
    known = [config.id2label[index] for index in sorted(config.id2label)] if config.id2label else []
    if found and found <= set(known):
        return known
    if len(found) < 2 and not isinstance(labels[0], list):
        hint = "Give rows with at least two labels, or set `options.problem_type: regression`."
        raise DataError(f"every training row has the label {labels[0]!r}", hint=hint)
    if not found:
        raise DataError("no training row has a label", hint="Give rows with labels.")
    numbers = all(name.lstrip("-").isdecimal() for name in found)
    return sorted(found, key=lambda name: (int(name), "") if numbers else (0, name))


def _check_label(table: Table, row: int, labels: Sequence[str], known: dict[str, int]) -> None:
    for label in labels:
        if label not in known:
            near = nearest(label, known)
            meant = f" Did you mean `{near}`?" if near else ""
            raise table.error(row, f"unknown label {label!r}", f"The labels are {', '.join(known)}.{meant}")


def _shown(label: Any) -> str:
    if isinstance(label, float):
        return f"{label:.4g}"
    return (", ".join(label) or "-") if isinstance(label, list) else str(label)
