"""`masked-lm`: guess masked words of plain text, to fit an encoder to a domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.train.batched import in_batches
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE, framing
from veneer.train.errors import DataError
from veneer.train.processes import merged, summed
from veneer.train.tasks.base import Outcome, Plan, Task, text_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["MaskedLM", "MaskedLMOptions"]


@dataclass
class MaskedLMOptions:
    """mlm_probability: the share of tokens to guess. whole_word: mask all tokens of a word or none. join: put the
    texts one after the other and cut them into rows of `data.max_length`; otherwise each text is a row.
    """

    mlm_probability: float = 0.15
    whole_word: bool = True
    join: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must lie between 0 and 1, got {self.mlm_probability}")


class MaskedLM(Task):
    """Masked language modelling; masks are drawn anew in each epoch, those of the test rows once."""

    name: ClassVar[str] = "masked-lm"
    task_type: ClassVar[str | None] = None
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("text",),)
    pipeline: ClassVar[str] = "fill-mask"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 3e-4, "per_device_train_batch_size": 16}
    new_head: ClassVar[bool] = False
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("text",),)
    Options: ClassVar[type] = MaskedLMOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        return text_problem(layout, row, "text")

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """The texts as rows of tokens and the word each token is part of."""
        if tokenizer.mask_token_id is None:
            hint = "Choose an encoder such as BERT; `causal-lm` trains decoders."
            raise recipe.error("base", "name", problem="the model has no mask token", hint=hint)
        limit = token_limit(recipe, tokenizer, config)
        rows = self._rows(train, tokenizer, limit)
        plan = Plan(train=_dataset(train, rows, 0))
        if not self.options.join:
            cut = sum(length > limit for _, _, length in rows)
            if cut:
                plan.notes.append(f"{cut} of {len(train)} training rows are cut to {limit} tokens.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """The test rows' tokens under masks that never change."""
        limit = token_limit(recipe, tokenizer, config)
        plan.test = _dataset(test, self._rows(test, tokenizer, limit), -1)
        plan.targets = plan.test.to_list()
        batch = self.collator(tokenizer)(plan.targets)
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            wanted = [label for label in labels if label != IGNORE]
            hidden = [tokenizer.mask_token_id if label != IGNORE else token for token, label in zip(ids, labels)]
            shown = tokenizer.decode([token for token in hidden if token != tokenizer.pad_token_id])
            plan.examples.append((shown, tokenizer.decode(wanted)))

    def collator(self, tokenizer: Any, multiple_of: int = 1, seed: int = 0) -> Any:
        """Masks rows as it puts them into a batch."""
        from veneer.train.collate import Collator
        from veneer.train.masking import MaskingCollator

        special = set(tokenizer.all_special_ids)
        vocabulary = [token for token in range(len(tokenizer)) if token not in special]
        inner = Collator(tokenizer.pad_token_id, multiple_of)
        return MaskingCollator(inner, tokenizer.mask_token_id, vocabulary, self.options.mlm_probability, seed)

    def begin_epoch(self, collate: Any, epoch: int) -> None:
        """Other masks in each epoch."""
        collate.epoch = epoch

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """Cross entropy of the masked tokens, with logits at those alone."""
        from torch.nn.functional import cross_entropy

        from veneer.train.loss import labelled_logits

        logits, targets = labelled_logits(model, batch, shifted=False)
        total = cross_entropy(logits.float(), targets, reduction="sum")
        return total / (targets.numel() if items is None else items)

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """Logits at the masked tokens."""
        from veneer.train.meta_loss import vocabulary_loss

        return vocabulary_loss(model, rows, tokens, self.options.mlm_probability, chunked=False)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """Loss on the test rows' masked tokens, and how many of them are guessed."""
        from torch.nn.functional import cross_entropy

        from veneer.train.collate import batches
        from veneer.train.generate import evaluating
        from veneer.train.loss import labelled_logits

        assert plan.test is not None
        device = next(model.parameters()).device
        guesses: list[Any] = [None] * len(plan.test)
        total, hits, count = 0.0, 0.0, 0.0
        with evaluating(model):
            for part, batch in batches(plan.test, self.collator(tokenizer), recipe.eval.batch_size, device):
                logits, targets = labelled_logits(model, batch, shifted=False)
                total += float(cross_entropy(logits.float(), targets, reduction="sum"))
                best = logits.argmax(-1)
                hits, count = hits + int((best == targets).sum()), count + targets.numel()
                sizes = (batch["labels"] != IGNORE).sum(1).tolist()
                for number, row in zip(part, best.split(sizes), strict=True):
                    guesses[number] = row.tolist()
        guesses, [total, hits, count] = merged(guesses), summed(total, hits, count)
        loss = total / count
        scores = {"accuracy": hits / count, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        texts = [tokenizer.decode(row) for row in guesses]
        return Outcome(scores, texts, [text == want for text, (_, want) in zip(texts, plan.examples, strict=True)])

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`text` with its masks filled, and for each mask the likeliest tokens and their shares in `fills`."""
        import torch

        from veneer.train.generate import evaluating

        tokenizer, model = loaded.tokenizer, loaded.model
        limit, answers = token_limit(recipe, tokenizer, model.config), []
        device = next(model.parameters()).device
        with evaluating(model):
            for number, text in enumerate(table.dataset["text"][:]):
                if tokenizer.mask_token not in text:
                    raise table.error(number, "no word to fill", f"Write {tokenizer.mask_token} where one is missing.")
                batch = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(device)
                places = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
                length = batch["input_ids"].shape[1]
                shares, tokens = model(**batch).logits[0, -length:][places].float().softmax(-1).topk(5)
                fills = []
                for share, token in zip(shares.tolist(), tokens.tolist(), strict=True):
                    words = [tokenizer.decode([one]).strip() for one in token]
                    fills.append([{"token": word, "score": value} for word, value in zip(words, share, strict=True)])
                ids = batch["input_ids"][0].masked_scatter(
                    batch["input_ids"][0] == tokenizer.mask_token_id, tokens[:, 0]
                )
                answers.append(
                    {"text": tokenizer.decode(torch.as_tensor(ids), skip_special_tokens=True), "fills": fills}
                )
        return answers

    def _rows(self, table: Table, tokenizer: Any, limit: int) -> list[tuple[list[int], list[int], int]]:
        """(tokens, their words, tokens before cutting) of each row, special tokens around them."""
        before, after = framing(tokenizer)
        room = limit - len(before) - len(after)
        between = [tokenizer.sep_token_id] if tokenizer.sep_token_id is not None else after[-1:]
        rows: list[tuple[list[int], list[int], int]] = []
        ids: list[int] = []
        words: list[int] = []

        def encode(first: int, last: int) -> list[tuple[list[int], Sequence[int | None]]]:
            texts = table.dataset[first:last]["text"]
            out = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            whole = self.options.whole_word
            return [(row, out.word_ids(n) if whole else range(len(row))) for n, row in enumerate(out["input_ids"])]

        for batch in in_batches(len(table), encode, table.workers):
            for row, own in batch:
                if not self.options.join:
                    rows.append((*_framed(row[:room], _plain(own[:room]), before, after), len(row) + limit - room))
                    continue
                base = 1 + max(words, default=-1)
                ids += ([*between] if ids else []) + row
                words += ([-1] * len(between) if len(ids) > len(row) else []) + [base + word for word in _plain(own)]
                while len(ids) >= room:
                    rows.append((*_framed(ids[:room], words[:room], before, after), limit))
                    ids, words = ids[room:], words[room:]
        if any(word >= 0 for word in words):
            rows.append((*_framed(ids, words, before, after), len(ids)))
        return rows


def _plain(words: Sequence[int | None]) -> list[int]:
    return [-1 if word is None else word for word in words]


def _framed(
    ids: Sequence[int], words: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> tuple[list[int], list[int]]:
    return [*before, *ids, *after], [-1] * len(before) + list(words) + [-1] * len(after)


def _dataset(table: Table, rows: Sequence[tuple[list[int], list[int], int]], first: int) -> Any:
    import datasets

    for number, (_, words, _) in enumerate(rows):
        if all(word < 0 for word in words):
            if len(rows) == len(table):
                raise table.error(number, "no token to mask")
            raise DataError(f"row {number + 1} of joined texts has no token to mask", file=table.path)
    step = 1 if first >= 0 else -1
    return datasets.Dataset.from_dict(
        {
            "input_ids": [ids for ids, _, _ in rows],
            "words": [words for _, words, _ in rows],
            "row": [first + step * number for number in range(len(rows))],
            "length": [len(ids) for ids, _, _ in rows],
        }
    )
