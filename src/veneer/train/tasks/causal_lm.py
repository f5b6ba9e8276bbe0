"""`causal-lm`: plain text, prompts with completions, or chat; what is learned is the answers (or text)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.train import metrics
from veneer.train.data import Layout, Table, is_text
from veneer.train.encode import (
    IGNORE,
    Encoded,
    Piece,
    chat_pieces,
    encode_marked,
    encode_pieces,
    has_markers,
)
from veneer.train.errors import DataError, RecipeError
from veneer.train.tasks.base import Outcome, Plan

if TYPE_CHECKING:
    import torch

    from veneer.train.recipe import EvalSpec, Recipe

__all__ = ["CausalLM"]

_BATCH = 1000


class CausalLM:
    """Next-token prediction; loss on the assistant's turns, on the completion, or on the whole text."""

    name: ClassVar[str] = "causal-lm"
    task_type: ClassVar[str] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("prompt", "completion"), ("text",))
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-4, "per_device_train_batch_size": 8}
    whole_words: ClassVar[bool] = False
    predicts_next: ClassVar[bool] = True

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        if layout.kind == "messages":
            return _check_messages(row["messages"])
        for role, value in row.items():
            if not is_text(value):
                what = "is empty" if isinstance(value, str) else f"is {type(value).__name__}, expected text"
                return f"{layout.columns[role]!r} {what}"
        return ""

    def plan(self, recipe: Recipe, train: Table, test: Table | None, tokenizer: Any, config: Any) -> Plan:
        """Tokens and labels of every row, and the prompts and answers of the test rows."""
        limit = min(recipe.data.max_length, tokenizer.model_max_length, _positions(config))
        rows = list(_encode(train, tokenizer))
        plan = Plan(train=_dataset(rows, train, limit), stop_ids=set().union(*(row.stops for row in rows)))
        cut = sum(len(row.input_ids) > limit for row in rows)
        if cut:
            plan.notes.append(f"{cut} of {len(rows)} training rows are cut to {limit} tokens.")
        if tokenizer.eos_token_id is None:
            plan.notes.append("The tokenizer has no end-of-text token: the model does not learn to stop.")
        if test is None:
            return plan
        test = test if recipe.eval.limit is None else test.select(range(min(recipe.eval.limit, len(test))))
        tests = list(_encode(test, tokenizer))
        plan.test = _dataset(tests, test, limit)
        if test.layout.kind != "text" and recipe.eval.generate:
            plan.examples = [_example(test, row) for row in range(len(test))]
            plan.targets = [row.input_ids[: row.prompt] for row in tests]
            plan.stop_ids |= set().union(*(row.stops for row in tests))
            _check_metric(recipe.eval, plan)
        return plan

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The model's own loss, with logits at the labels alone."""
        from veneer.train.loss import labelled_loss

        return labelled_loss(model, batch, items)

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
        score = metrics.json_scores if _metric(recipe.eval, expected) == "json" else metrics.exact_scores
        found, correct = score(expected, texts)
        return Outcome(found | scores, texts, correct)

    def _test_loss(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, batch_size: int) -> float:
        import torch

        from veneer.train.collate import Collator
        from veneer.train.generate import evaluating

        assert plan.test is not None
        rows = sorted(plan.test.to_list(), key=lambda row: row["length"])
        collate, device = Collator(tokenizer.pad_token_id), next(model.parameters()).device
        total, count = 0.0, 0
        with evaluating(model):
            for first in range(0, len(rows), batch_size):
                batch = {key: value.to(device) for key, value in collate(rows[first : first + batch_size]).items()}
                total += float(self.loss(model, batch, torch.tensor(1.0, device=device)))
                count += int((batch["labels"][:, 1:] != IGNORE).sum())
        return total / count


def _check_messages(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list of turns" if not isinstance(messages, list) else "'messages' is empty"
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"turn {number} has no 'role'"
        if not isinstance(turn.get("content"), str):
            return f"turn {number} ({turn['role']}) has no text in 'content'"
        if not turn["content"].strip() and turn["role"] != "system":
            return f"turn {number} ({turn['role']}) is empty"
    if not any(turn["role"] == "assistant" for turn in messages):
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
        return f"no turn of the assistant to learn from; the roles are {roles}"
    return ""


def _positions(config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 1 << 30


def _encode(table: Table, tokenizer: Any) -> Iterator[Encoded]:
    for first in range(0, len(table), _BATCH):
        batch = table.dataset[first : first + _BATCH]
        if table.layout.kind == "messages":
            yield from _encode_chats(table, tokenizer, batch["messages"], first)
        elif table.layout.kind == "text":
            yield from encode_pieces(tokenizer, [[Piece(text, True)] for text in batch["text"]], chat=False)
        else:
            pairs = zip(batch["prompt"], batch["completion"], strict=True)
            rows = [[Piece(prompt, False), Piece(completion, True)] for prompt, completion in pairs]
            yield from encode_pieces(tokenizer, rows, chat=False)


def _encode_chats(table: Table, tokenizer: Any, chats: Sequence[Any], first: int) -> list[Encoded]:
    if tokenizer.chat_template is None:
        hint = "Choose a chat model, or give `prompt` and `completion` columns."
        raise DataError("chat rows, and the model has no chat template", file=table.path, hint=hint)
    cut: Callable[[Any], Any] = lambda chat: chat_pieces(tokenizer, chat)
    if has_markers(tokenizer):
        cut = lambda chat: encode_marked(tokenizer, chat)
    found = []
    for number, chat in enumerate(chats):
        try:
            found.append(cut(chat))
        except ValueError as error:
            raise table.error(first + number, str(error)) from error
    return found if has_markers(tokenizer) else encode_pieces(tokenizer, found, chat=True)


def _dataset(rows: Sequence[Encoded], table: Table, limit: int) -> Any:
    """The rows cut to ``limit`` tokens.

    Raises:
        DataError: rows that keep no label.
    """
    import datasets

    labels = [row.labels[:limit] for row in rows]
    empty = [index for index, row in enumerate(labels) if all(label == IGNORE for label in row)]
    if empty:
        longest = max(len(rows[index].input_ids) for index in empty)
        more = f" ({len(empty)} rows in all)" if len(empty) > 1 else ""
        if longest > limit:
            problem = f"nothing to learn is left after cutting to {limit} tokens{more}"
            hint = f"Raise `data.max_length` (the longest of these has {longest} tokens) or shorten the prompts."
        else:
            problem, hint = f"no token to learn{more}", "Give each row an answer, or two tokens of text."
        raise table.error(empty[0], problem, hint)
    ids = [row.input_ids[:limit] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})


def _example(table: Table, number: int) -> tuple[str, str]:
    row = table.dataset[number]
    if table.layout.kind != "messages":
        return row["prompt"].strip(), row["completion"].strip()
    messages = row["messages"]
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant")
    asked = [turn["content"].strip() for turn in messages[:last] if turn["role"] == "user"]
    return (asked[-1] if asked else ""), messages[last]["content"].strip()


def _metric(spec: EvalSpec, expected: Sequence[str]) -> str:
    if spec.metric != "auto":
        return spec.metric
    return "json" if metrics.answers_are_json(expected) else "exact"


def _check_metric(spec: EvalSpec, plan: Plan) -> None:
    if spec.metric not in {"auto", "json", "exact"}:
        hint = "For causal-lm it is auto, json or exact."
        raise RecipeError(f"{spec.metric!r} does not fit answers in text", key="eval.metric", hint=hint)
    if spec.metric == "json" and not metrics.answers_are_json([answer for _, answer in plan.examples]):
        hint = "Set `eval.metric: exact`, or write each expected answer as a JSON object or list."
        raise RecipeError("an expected answer in the test rows is not JSON", key="eval.metric", hint=hint)


def _stops(model: Any, tokenizer: Any, plan: Plan) -> set[int]:
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return {token for token in (*plan.stop_ids, *own, tokenizer.eos_token_id) if token is not None}


def _longest_answer(tokenizer: Any, expected: Sequence[str]) -> int:
    """Room for the longest expected answer and a quarter more: a rambling model is cut, a right one not."""
    ids = tokenizer(list(expected), add_special_tokens=False)["input_ids"]
    return math.ceil(1.25 * max(len(row) for row in ids)) + 8
