"""`question-answering`: the part of a text that answers a question, however long the text is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.train.batched import in_batches
from veneer.train.data import Layout, Table
from veneer.train.processes import merged, summed
from veneer.train.qa_spans import Span, Window, answer_list, best_span, span_scores, windows_of
from veneer.train.tasks.base import Outcome, Plan, Task, text_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["QAOptions", "QuestionAnswering"]

_BATCH = 200


@dataclass
class QAOptions:
    """stride: tokens that neighbouring windows of a long context share. max_answer_length: longest answer in
    tokens. n_best: starts and ends tried for each window. null_threshold: how far the score of "no answer" must be
    above the best span's, where training rows without an answer taught it.
    """

    stride: int = 128
    max_answer_length: int = 30
    n_best: int = 20
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise ValueError(f"stride must not be negative, got {self.stride}")
        for name in ("max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class QuestionAnswering(Task):
    """Extractive answers, learned as the first and the last token of a span in each window."""

    name: ClassVar[str] = "question-answering"
    task_type: ClassVar[str | None] = "QUESTION_ANS"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("question", "context", "answers"),)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {"answers": ("answer",)}
    pipeline: ClassVar[str] = "question-answering"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-4, "per_device_train_batch_size": 16}
    label_columns: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("question", "context"),)
    smooths: ClassVar[bool] = False
    Options: ClassVar[type] = QAOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        problem = text_problem(layout, row, "question", "context")
        if problem:
            return problem
        try:
            answer_list(row["answers"], row["context"])
        except ValueError as error:
            return f"{layout.columns['answers']!r}: {error}"
        return ""

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Windows over every context, and where each one's answer begins and ends."""
        limit = token_limit(recipe, tokenizer, config)
        dataset, windows, lost = self._encode(train, tokenizer, limit)
        answered = [bool(answers) for answers in _answers(train)]
        plan = Plan(train=dataset, facts={"unanswerable": not all(answered)})
        if len(windows) > len(train):
            plan.notes.append(f"{len(train)} training rows make {len(windows)} windows of up to {limit} tokens.")
        if lost:
            plan.notes.append(f"{lost} training answers are longer than a window and are left out.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """The windows of the test rows, and their answers."""
        limit = token_limit(recipe, tokenizer, config)
        plan.test, tested, _ = self._encode(test, tokenizer, limit)
        expected = [[text for text, _ in answers] for answers in _answers(test)]
        plan.targets = [tested, test.dataset["context"][:], expected]
        pairs = zip(test.dataset["question"][:], test.dataset["context"][:], strict=True)
        shown = [f"{question} | {context}" for question, context in pairs]
        plan.examples = [(text, answers[0] if answers else "") for text, answers in zip(shown, expected, strict=True)]

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One for each window."""
        return batch["start_positions"]

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The mean of the cross entropies of an answer's first and last token."""
        from torch.nn.functional import cross_entropy

        logits = self.span_logits(model, batch)
        names = ("start_positions", "end_positions")
        start, end = (cross_entropy(side, batch[name], reduction="sum") for side, name in zip(logits, names))
        return (start + end) / 2 / (len(batch["start_positions"]) if items is None else items)

    def span_logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of each token as first and as last of the answer, (rows, length) each; -inf on padding."""
        out = model(**{key: value for key, value in batch.items() if key not in self.label_columns})
        length, padding = batch["input_ids"].shape[1], batch["attention_mask"] == 0
        sides = (logits[:, -length:].float() for logits in (out.start_logits, out.end_logits))
        start, end = (side.masked_fill(padding, float("-inf")) for side in sides)
        return start, end

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """The best span of each test row's windows against its answers."""
        assert plan.test is not None
        windows, contexts, expected = plan.targets
        size, null = recipe.eval.batch_size, plan.facts["unanswerable"]
        spans, loss = self.answer(model, tokenizer, plan.test, windows, contexts, size, null)
        answers = [span.text for span in spans]
        scores, right = span_scores(expected, answers)
        return Outcome(scores | {"loss": loss}, answers, right)

    def answer(
        self, model: torch.nn.Module, tokenizer: Any, dataset: Any, windows: Sequence[Window],
        contexts: Sequence[str], batch_size: int, may_be_none: bool,
    ) -> tuple[list[Span], float]:  # fmt: skip
        """The best span for each context, and the mean loss where ``dataset`` holds the right ones."""
        import torch

        from veneer.train.collate import batches
        from veneer.train.generate import evaluating

        device, total = next(model.parameters()).device, 0.0
        scores: list[Any] = [None] * len(windows)
        with evaluating(model):
            for part, batch in batches(dataset, self.collator(tokenizer), batch_size, device):
                start, end = self.span_logits(model, batch)
                if "start_positions" in batch:
                    total += float(self.loss(model, batch, torch.ones((), device=device)))
                for number, *sides in zip(part, start.tolist(), end.tolist(), strict=True):
                    scores[number] = sides
        scores, [total] = merged(scores), summed(total)
        of_row: list[list[int]] = [[] for _ in contexts]
        for number, window in enumerate(windows):
            of_row[window.row].append(number)
        threshold = self.options.null_threshold if may_be_none else None
        longest, n_best = self.options.max_answer_length, self.options.n_best
        spans = []
        for context, numbers in zip(contexts, of_row, strict=True):
            starts, ends = ([scores[number][side] for number in numbers] for side in (0, 1))
            own = [windows[number] for number in numbers]
            spans.append(best_span(own, starts, ends, context, n_best, longest, threshold))
        return spans, total / max(len(windows), 1)

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`answer` with its characters `start` to `end` of the context, and `score`; empty where there is none."""
        limit = token_limit(recipe, loaded.tokenizer, loaded.model.config)
        windows = self.cut(table, loaded.tokenizer, limit)
        none = bool(loaded.purpose.facts.get("unanswerable"))
        rows, contexts, size = window_rows(windows), table.dataset["context"][:], recipe.eval.batch_size
        spans, _ = self.answer(loaded.model, loaded.tokenizer, rows, windows, contexts, size, none)
        return [{"answer": s.text, "start": s.start, "end": s.end, "score": s.score} for s in spans]

    def cut(self, table: Table, tokenizer: Any, limit: int) -> list[Window]:
        """The windows of every row.

        Raises:
            DataError: a question that leaves no room for the context.
        """
        room = limit - tokenizer.num_special_tokens_to_add(pair=True)

        def encode(first: int, last: int) -> list[Window]:
            batch = table.dataset[first:last]
            questions = tokenizer(batch["question"], add_special_tokens=False, verbose=False)["input_ids"]
            for number, ids in enumerate(questions):
                if room - len(ids) <= self.options.stride:
                    hint = "Raise `data.max_length`, lower `options.stride`, or shorten the question."
                    problem = f"a question of {len(ids)} tokens leaves {max(room - len(ids), 0)} of {limit} tokens for"
                    raise table.error(
                        first + number, f"{problem} the context, with a stride of {self.options.stride}", hint
                    )
            cut = windows_of(tokenizer, batch["question"], batch["context"], limit, self.options.stride)
            return [Window(w.row + first, w.input_ids, w.token_type_ids, w.offsets, w.none) for w in cut]

        batches = in_batches(len(table), encode, table.workers, _BATCH)
        return list(itertools.chain.from_iterable(batches))

    def _encode(self, table: Table, tokenizer: Any, limit: int) -> tuple[Any, list[Window], int]:
        answers = _answers(table)
        windows = self.cut(table, tokenizer, limit)
        places, found = [], set()
        for window in windows:
            text, start = (answers[window.row] or [("", -1)])[0]
            place = window.find(start, start + len(text)) if text else None
            found |= {window.row} if place is not None else set()
            places.append(place or (window.none, window.none))
        lost = sum(bool(own) and row not in found for row, own in enumerate(answers))
        starts, ends = [first for first, _ in places], [last for _, last in places]
        return window_rows(windows, start_positions=starts, end_positions=ends), windows, lost


def window_rows(windows: Sequence[Window], **columns: list[Any]) -> Any:
    """Windows as a dataset."""
    import datasets

    columns |= {"input_ids": [w.input_ids for w in windows], "length": [len(w.input_ids) for w in windows]}
    if windows and windows[0].token_type_ids is not None:
        columns["token_type_ids"] = [w.token_type_ids for w in windows]
    return datasets.Dataset.from_dict(columns)


def _answers(table: Table) -> list[list[tuple[str, int]]]:
    pairs = zip(table.dataset["answers"][:], table.dataset["context"][:], strict=True)
    return [answer_list(value, context) for value, context in pairs]
