"""`reward`: a score for an answer, learned from pairs of a better and a worse one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.train import pairs
from veneer.train.data import Layout, Table
from veneer.train.processes import merged, summed
from veneer.train.tasks.base import Outcome, Plan, Task, token_limit
from veneer.train.tasks.dpo import preferences

if TYPE_CHECKING:
    import torch

    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["Reward", "RewardOptions"]


@dataclass
class RewardOptions:
    """margin: how much higher the better answer's score must be. center: weight of the squared sum of a pair's two
    scores, which keeps scores near zero (Eisenstein et al. 2023, section 2).
    """

    margin: float = 0.0
    center: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "center"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class Reward(Task):
    """A head with one score, trained on pairs (Bradley and Terry 1952; Ouyang et al. 2022, equation 1)."""

    name: ClassVar[str] = "reward"
    task_type: ClassVar[str | None] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = pairs.LAYOUTS
    mixes: ClassVar[bool] = True
    aliases: ClassVar[dict[str, tuple[str, ...]]] = pairs.ALIASES | {"chosen": ("answer", "completion", "messages")}
    pipeline: ClassVar[str] = "text-classification"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4, "per_device_train_batch_size": 8}
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "chosen"), ("chosen",))
    smooths: ClassVar[bool] = False
    Options: ClassVar[type] = RewardOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        return pairs.check_pair(layout, row)

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Tokens of both answers, what was asked before them."""
        limit = token_limit(recipe, tokenizer, config)
        dataset, cut = self._encode(train, tokenizer, limit)
        plan = Plan(train=dataset, model_options={"num_labels": 1})
        if cut:
            plan.notes.append(f"{cut} of {len(train)} training rows are cut to {limit} tokens.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Tokens of the test rows' answers, and both as text."""
        limit = token_limit(recipe, tokenizer, config)
        plan.test, _ = self._encode(test, tokenizer, limit)
        pairs.show_answers(plan, test)

    def collator(self, tokenizer: Any, multiple_of: int = 1, seed: int = 0) -> Any:
        """Chosen and rejected answers in turn."""
        return pairs.collator(tokenizer, multiple_of)

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One for each pair."""
        return batch["labels"]

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The mean loss of the pairs."""
        return self._losses(self.scores(model, batch)).sum() / (len(batch["labels"]) if items is None else items)

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The score of each row, (rows,)."""
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, 0].float()

    def _losses(self, scores: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import logsigmoid

        chosen, rejected = scores[::2], scores[1::2]
        return -logsigmoid(chosen - rejected - self.options.margin) + self.options.center * (chosen + rejected) ** 2

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """Both answers."""
        from veneer.train.meta_loss import outputs_loss

        return outputs_loss(model, 2 * rows, tokens)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """How often, and by how much, the better answer scores higher."""
        from veneer.train.collate import batches
        from veneer.train.generate import evaluating

        assert plan.test is not None
        device = next(model.parameters()).device
        gaps: list[float | None] = [None] * len(plan.test)
        total = 0.0
        with evaluating(model):
            for part, batch in batches(plan.test, self.collator(tokenizer), recipe.eval.batch_size, device):
                scores = self.scores(model, batch)
                total += float(self._losses(scores).sum())
                for number, gap in zip(part, (scores[::2] - scores[1::2]).tolist(), strict=True):
                    gaps[number] = gap
        return preferences(plan, merged(gaps), *summed(total))

    def check_ask(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with an answer that is to be scored, or an empty string."""
        return pairs.check_answer(layout, row)

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`score`: the answer's."""
        import datasets

        from veneer.train.collate import Collator, batches
        from veneer.train.generate import evaluating

        limit, device = (
            token_limit(recipe, loaded.tokenizer, loaded.model.config),
            next(loaded.model.parameters()).device,
        )
        encoded = encode_answers(table, "chosen", loaded.tokenizer)
        columns = {name: [row[:limit] for row in values] for name, values in encoded.items()}
        columns["length"] = [len(row) for row in columns["input_ids"]]
        rows, collate = datasets.Dataset.from_dict(columns), Collator(loaded.tokenizer.pad_token_id)
        answers: list[dict[str, Any]] = [{} for _ in range(len(table))]
        with evaluating(loaded.model):
            for part, batch in batches(rows, collate, recipe.eval.batch_size, device):
                for number, score in zip(part, self.scores(loaded.model, batch).tolist(), strict=True):
                    answers[number] = {"score": score}
        for answer, row in zip(answers, encoded["input_ids"], strict=True):
            answer |= {"cut": True} if len(row) > limit else {}
        return answers

    def _encode(self, table: Table, tokenizer: Any, limit: int) -> tuple[Any, int]:
        import datasets

        columns: dict[str, list[Any]] = {"length": [0] * len(table), "labels": [0] * len(table)}
        cut: set[int] = set()
        for side in pairs.SIDES:
            encoded = encode_answers(table, side, tokenizer)
            for name, values in encoded.items():
                columns[f"{side}_{name}"] = [row[:limit] for row in values]
            cut |= {number for number, row in enumerate(encoded["input_ids"]) if len(row) > limit}
            lengths = (len(row) for row in columns[f"{side}_input_ids"])
            columns["length"] = [max(pair) for pair in zip(columns["length"], lengths)]
        return datasets.Dataset.from_dict(columns), len(cut)


def encode_answers(table: Table, side: str, tokenizer: Any) -> dict[str, list[Any]]:
    """Tokens of each row's answer after what was asked: a conversation, or one text or two as the model takes them."""
    rows = table.dataset.to_list()
    if pairs.are_messages(rows[0][side]) or pairs.are_messages(rows[0].get("prompt")):
        return {"input_ids": [row.input_ids for row in pairs.encode_side(table, rows, side, tokenizer)]}
    found: dict[str, list[Any]] = {}
    for asked in (True, False):  # where sources are mixed some rows may have no prompt
        part = [number for number, row in enumerate(rows) if (row.get("prompt") is not None) == asked]
        if part:
            texts = [[rows[number]["prompt"] for number in part]] if asked else []
            out = tokenizer(*texts, [rows[number][side] for number in part], return_attention_mask=False, verbose=False)
            for name in out.keys() & {"input_ids", "token_type_ids"}:
                for number, values in zip(part, out[name], strict=True):
                    found.setdefault(name, [None] * len(rows))[number] = values
    return found
