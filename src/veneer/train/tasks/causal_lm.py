"""`causal-lm`: plain text, prompts with completions, or chat; what is learned is the answers (or text)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from veneer.train import text_scores
from veneer.train.asking import asking_of
from veneer.train.batched import in_batches
from veneer.train.causal_rows import check_messages, encode_rows, example
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE, Encoded
from veneer.train.processes import summed
from veneer.train.tasks.base import Outcome, Plan, Task, prompt_problem, text_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe

__all__ = ["CausalLM", "CausalLMOptions"]


@dataclass
class CausalLMOptions:
    """packing: `chunk` puts texts one after the other and cuts them every `data.max_length` tokens (continued
    pre-training); `pack` puts whole rows side by side up to that length, and no row sees another. train_on_prompt:
    learn the prompts too, not the answers alone. as_chat: prompts and completions go through the model's chat template,
    as a question and its answer. share_prefix: what all rows of a batch begin with (a system prompt)
    is computed once, and nothing is padded, where the model can read rows so and it is less work.
    """

    packing: Literal["none", "chunk", "pack"] = "none"
    train_on_prompt: bool = False
    as_chat: bool = False
    share_prefix: bool = True


class CausalLM(Task):
    """Next-token prediction; loss on the assistant's turns, on the completion, or on the whole text."""

    name: ClassVar[str] = "causal-lm"
    task_type: ClassVar[str] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("prompt", "completion"), ("text",))
    pipeline: ClassVar[str] = "text-generation"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-4, "per_device_train_batch_size": 8}
    metrics: ClassVar[tuple[str, ...]] = text_scores.CHOICES
    predicts_next: ClassVar[bool] = True
    new_head: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {"messages": ("conversations", "conversation")}
    writes: ClassVar[bool] = True
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("prompt",), ("text",))
    Options: ClassVar[type] = CausalLMOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        if layout.kind == "messages":
            return check_messages(row["messages"])
        return text_problem(layout, row, *layout.columns)

    def check_ask(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a prompt, or an empty string."""
        return prompt_problem(layout, row)

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Tokens and labels of every row, and the prompts and answers of the test rows."""
        limit = token_limit(recipe, tokenizer, config)
        if self.options.packing == "chunk" and train.layout.kind != "text":
            hint = "Set `options.packing: pack`, or train on a `text` column."
            problem = f"`chunk` cuts texts, and the rows have {train.layout.kind.replace('|', ' or ')}"
            raise recipe.error("options", "packing", problem=problem, hint=hint)
        rows = list(self._encode(train, tokenizer))
        plan = Plan(train=self._dataset(rows, train, limit), stop_ids=set().union(*(row.stops for row in rows)))
        plan.asking = asking_of(train, self.options.as_chat)
        cut = sum(len(row.input_ids) > limit for row in rows)
        if self.options.packing != "none":
            plan.notes.append(_packed(plan.train, rows, limit))
        if cut and self.options.packing != "chunk":
            plan.notes.append(f"{cut} of {len(rows)} training rows are cut to {limit} tokens.")
        if tokenizer.eos_token_id is None:
            plan.notes.append("The tokenizer has no end-of-text token: the model does not learn to stop.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Tokens of the test rows, and their prompts and answers."""
        limit = token_limit(recipe, tokenizer, config)
        tests = list(self._encode(test, tokenizer))
        plan.test = self._dataset(tests, test, limit, whole=self.options.packing != "chunk")
        asked = [number for number, row in enumerate(test.dataset) if test.layout.of_row(row) != "text"]
        if asked and recipe.eval.generate:
            plan.examples = [example(test, row) for row in asked]
            plan.targets = [tests[row].input_ids[: tests[row].prompt] for row in asked]
            plan.stop_ids |= set().union(*(row.stops for row in tests))
            text_scores.check_metric(recipe.eval, [answer for _, answer in plan.examples])

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The model's own loss, with logits at the labels alone."""
        from veneer.train.loss import labelled_loss

        return labelled_loss(model, _unmasked(batch), items)

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores of every token."""
        return super().logits(model, _unmasked(batch))

    def check_model(self, model: torch.nn.Module, plan: Plan) -> None:
        """Packed rows must not see each other."""
        if "position_ids" in plan.train.column_names:
            from veneer.train.packing import check_packing

            check_packing(model)

    @contextmanager
    def batch_form(self, model: Any, plan: Plan, collate: Any) -> Iterator[Callable[[Any], Any] | None]:
        """Batches whose rows share what they begin with."""
        from veneer.train.prefix import shared_prefix

        if not self.options.share_prefix or self.options.packing != "none" or len(plan.train) < 2:
            yield None
            return
        device = next(model.parameters()).device
        batch = {name: values.to(device) for name, values in collate([plan.train[0], plan.train[1]]).items()}
        longest = max(plan.train["length"]) if plan.stream is None else 1 << 30  # of a stream nobody knows
        with shared_prefix(model, batch, longest) as form:
            yield form

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """The head's loss in chunks of the labelled tokens."""
        from veneer.train.meta_loss import vocabulary_loss

        return vocabulary_loss(model, rows, tokens, labelled, chunked=True)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """Loss on the test rows, and greedy answers to their prompts scored against what was expected."""
        from veneer.train.generate import greedy

        mean = self._test_loss(model, tokenizer, plan, recipe.eval.batch_size)
        scores = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
        if not plan.examples:
            return Outcome(scores, [], [])
        expected = [answer for _, answer in plan.examples]
        answers = greedy(
            model,
            plan.targets,
            pad=tokenizer.pad_token_id,
            stops=_stops(model, tokenizer, plan),
            max_new_tokens=recipe.eval.max_new_tokens or _longest_answer(tokenizer, expected),
            batch_size=recipe.eval.batch_size,
        )
        texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        found, correct = text_scores.answer_scores(recipe.eval.metric, expected, texts)
        return Outcome(found | scores, texts, correct)

    def _encode(self, table: Table, tokenizer: Any) -> Iterator[Encoded]:
        encode = lambda first, last: encode_rows(table, tokenizer, first, last, self.options.as_chat)
        for row in itertools.chain.from_iterable(in_batches(len(table), encode, table.workers)):
            if self.options.train_on_prompt:
                row.labels = [IGNORE, *row.input_ids[1:]]
            yield row

    def _dataset(self, rows: Sequence[Encoded], table: Table, limit: int, whole: bool = False) -> Any:
        """The rows cut to ``limit`` tokens, and packed unless they are to stay ``whole``.

        Raises:
            DataError: rows that keep no label.
        """
        import datasets

        from veneer.train import packing

        if self.options.packing == "chunk" and not whole:
            _check_labels(table, rows, [row.labels for row in rows], limit)
            pairs = packing.chunk([(row.input_ids, row.labels) for row in rows], limit)
        else:
            pairs = [(row.input_ids[:limit], row.labels[:limit]) for row in rows]
            _check_labels(table, rows, [labels for _, labels in pairs], limit)
        if self.options.packing == "pack" and not whole:
            return datasets.Dataset.from_dict(packing.pack(pairs, limit))
        ids, labels = [row for row, _ in pairs], [row for _, row in pairs]
        return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})

    def _test_loss(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, batch_size: int) -> float:
        import torch

        from veneer.train.collate import Collator, batches
        from veneer.train.generate import evaluating

        assert plan.test is not None
        device = next(model.parameters()).device
        total, count = 0.0, 0.0
        with evaluating(model):
            for _, batch in batches(plan.test, Collator(tokenizer.pad_token_id), batch_size, device):
                total += float(self.loss(model, batch, torch.tensor(1.0, device=device)))
                count += int((batch["labels"][:, 1:] != IGNORE).sum())
        total, count = summed(total, count)
        return total / count


def _check_labels(table: Table, rows: Sequence[Encoded], labels: Sequence[Sequence[int]], limit: int) -> None:
    empty = [index for index, row in enumerate(labels) if all(label == IGNORE for label in row)]
    if not empty:
        return
    longest = max(len(rows[index].input_ids) for index in empty)
    more = f" ({len(empty)} rows in all)" if len(empty) > 1 else ""
    if longest > limit:
        problem = f"nothing to learn is left after cutting to {limit} tokens{more}"
        hint = f"Raise `data.max_length` (the longest of these has {longest} tokens) or shorten the prompts."
    else:
        problem, hint = f"no token to learn{more}", "Give each row an answer, or two tokens of text."
    raise table.error(empty[0], problem, hint)


def _packed(dataset: Any, rows: Sequence[Encoded], limit: int) -> str:
    tokens = sum(dataset["length"])
    share = 100 * tokens / (len(dataset) * max(dataset["length"]))
    return f"{len(rows)} training rows make {len(dataset)} of up to {limit} tokens, {share:.0f} % full."


def _unmasked(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A packed batch without its mask: the positions say which tokens belong together."""
    if "position_ids" not in batch or "joined_rows" in batch:
        return batch
    return {key: value for key, value in batch.items() if key != "attention_mask"} | {"use_cache": False}


def _stops(model: Any, tokenizer: Any, plan: Plan) -> set[int]:
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {token for token in (*plan.stop_ids, *own, tokenizer.eos_token_id) if token is not None}


def _longest_answer(tokenizer: Any, expected: Sequence[str]) -> int:
    """Room for the longest expected answer and a quarter more: a rambling model is cut, a right one not."""
    ids = tokenizer(list(expected), add_special_tokens=False)["input_ids"]
    return math.ceil(1.25 * max(len(row) for row in ids)) + 8
