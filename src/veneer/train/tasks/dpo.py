"""`dpo`: learn to prefer one answer over another, measured against the same model without its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from veneer.train import pairs
from veneer.train.asking import asking_of
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE
from veneer.train.processes import merged, summed
from veneer.train.tasks.base import Outcome, Plan, Task, prompt_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe

__all__ = ["DPO", "DPOOptions"]


@dataclass
class DPOOptions:
    """beta: how dear it is to leave the reference. loss_type: sigmoid (Rafailov et al. 2023, equation 7), hinge
    (Zhao et al. 2023) or ipo (Azar et al. 2023, equation 17). label_smoothing: the share of pairs taken to be
    labelled the wrong way round (sigmoid alone). sft_weight: of the chosen answer's own mean loss, added.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is for the sigmoid loss, and loss_type is {self.loss_type}")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight must not be negative, got {self.sft_weight}")


class DPO(Task):
    """Direct preference optimisation; the reference is the model with its adapter disabled, at no cost in memory."""

    name: ClassVar[str] = "dpo"
    task_type: ClassVar[str | None] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = pairs.LAYOUTS
    mixes: ClassVar[bool] = True
    aliases: ClassVar[dict[str, tuple[str, ...]]] = pairs.ALIASES
    pipeline: ClassVar[str] = "text-generation"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5, "per_device_train_batch_size": 4}
    smooths: ClassVar[bool] = False
    new_head: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("prompt",), ("text",))
    Options: ClassVar[type] = DPOOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        problem = pairs.check_pair(layout, row)
        if not problem and "prompt" not in row and not pairs.are_messages(row["chosen"]):
            return "no prompt: answers in text need a `prompt` column"
        return problem

    def check_ask(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a prompt, or an empty string."""
        return prompt_problem(layout, row)

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Tokens of both answers, labels on the answers alone."""
        import datasets

        limit = token_limit(recipe, tokenizer, config)
        columns, stops, cut = pairs.encode_pairs(train, tokenizer, limit)
        plan = Plan(train=datasets.Dataset.from_dict(columns), stop_ids=stops, asking=asking_of(train))
        if cut:
            plan.notes.append(f"{cut} of {len(train)} training rows are cut to {limit} tokens.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Tokens of the test rows' answers, and both as text."""
        import datasets

        limit = token_limit(recipe, tokenizer, config)
        plan.test = datasets.Dataset.from_dict(pairs.encode_pairs(test, tokenizer, limit)[0])
        pairs.show_answers(plan, test)

    def collator(self, tokenizer: Any, multiple_of: int = 1, seed: int = 0) -> Any:
        """Chosen and rejected answers in turn."""
        return pairs.collator(tokenizer, multiple_of)

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One for each pair."""
        import torch

        return torch.zeros_like(batch["labels"][::2, 0])

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The mean preference loss of the pairs."""
        reference = self._reference(model, batch)  # first, while nothing is kept for a backward
        chosen = answer_log_probs(model, batch)
        gains = chosen - reference
        each = self._preference(gains[::2] - gains[1::2])
        if self.options.sft_weight:
            tokens = (batch["labels"][::2, 1:] != IGNORE).sum(1)
            each = each - self.options.sft_weight * chosen[::2] / tokens
        return each.sum() / (len(each) if items is None else items)

    def _preference(self, gap: torch.Tensor) -> torch.Tensor:
        """The loss of each pair from how much more the chosen answer gained over the reference."""
        import torch.nn.functional as F

        beta, eps = self.options.beta, self.options.label_smoothing
        if self.options.loss_type == "hinge":
            return F.relu(1 - beta * gap)
        if self.options.loss_type == "ipo":
            return (gap - 1 / (2 * beta)) ** 2
        return -(1 - eps) * F.logsigmoid(beta * gap) - eps * F.logsigmoid(-beta * gap)

    def _reference(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from accelerate.utils import extract_model_from_parallel

        from veneer.model import PeftModel
        from veneer.train.generate import evaluating

        inner = extract_model_from_parallel(model)
        with evaluating(model):
            if not isinstance(inner, PeftModel):  # a base has no adapter to be compared with
                return answer_log_probs(model, batch)
            with inner.disable_adapter():
                return answer_log_probs(model, batch)

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """Both answers through the model, and through its base."""
        from veneer.train.meta_loss import vocabulary_loss

        return vocabulary_loss(model, 2 * rows, tokens, labelled, chunked=False, reference=True)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """How often, and by how much, the chosen answer is preferred to the rejected one.

        A reward is beta times what an answer's log-probability gained over the reference; where neither gained,
        as without an adapter, half of the pairs count as right.
        """
        from veneer.train.collate import batches
        from veneer.train.generate import evaluating

        assert plan.test is not None
        device = next(model.parameters()).device
        gaps: list[float | None] = [None] * len(plan.test)
        total = 0.0
        with evaluating(model):
            for part, batch in batches(plan.test, self.collator(tokenizer), recipe.eval.batch_size, device):
                own = answer_log_probs(model, batch)
                gains = own - self._reference(model, batch)
                gap = gains[::2] - gains[1::2]
                total += float(self._preference(gap).sum())
                for number, value in zip(part, gap.tolist(), strict=True):
                    gaps[number] = self.options.beta * value
        return preferences(plan, merged(gaps), *summed(total))


def preferences(plan: Plan, gaps: list[float], total: float) -> Outcome:
    """The outcome of reward gaps (chosen less rejected) and the sum of the losses; it answers what it prefers."""
    right = [gap > 0 for gap in gaps]
    ties = sum(gap == 0 for gap in gaps)
    scores = {
        "reward_accuracy": (sum(right) + ties / 2) / len(gaps),
        "reward_margin": sum(gaps) / len(gaps),
        "loss": total / len(gaps),
    }
    sides = zip(gaps, plan.examples, plan.targets, strict=True)
    return Outcome(scores, [chosen if gap > 0 else rejected for gap, (_, chosen), rejected in sides], right)


def answer_log_probs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of each row's labelled tokens, summed, (rows,)."""
    import torch
    from torch.nn.functional import cross_entropy

    from veneer.train.loss import labelled_logits

    logits, targets = labelled_logits(model, batch, shifted=True)
    rows = (batch["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
    each = -cross_entropy(logits.float(), targets, reduction="none")
    return torch.zeros(len(batch["labels"]), device=each.device).index_add(0, rows, each)
