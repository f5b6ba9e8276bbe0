"""`seq2seq`: a text into another, with an encoder and a decoder: translation, summaries, rewriting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.train import text_scores
from veneer.train.batched import in_batches
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE
from veneer.train.processes import summed
from veneer.train.tasks.base import Outcome, Plan, Task, text_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["Seq2Seq", "Seq2SeqOptions"]


@dataclass
class Seq2SeqOptions:
    """source_prefix: text put before each source, such as T5's `translate English to German: `. max_target_length:
    longest target in tokens, None for `data.max_length`. num_beams: of the beam search in evaluation.
    """

    source_prefix: str = ""
    max_target_length: int | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.max_target_length is not None and self.max_target_length < 2:
            raise ValueError(f"max_target_length must be at least 2, got {self.max_target_length}")


class Seq2Seq(Task):
    """Encoder-decoder models (T5, BART, Marian): the decoder learns the target, its end included."""

    name: ClassVar[str] = "seq2seq"
    task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("source", "target"),)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "source": ("document", "article", "input"),
        "target": ("summary", "highlights", "output"),
    }
    pipeline: ClassVar[str] = "text2text-generation"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-4, "per_device_train_batch_size": 8}
    metrics: ClassVar[tuple[str, ...]] = text_scores.CHOICES
    new_head: ClassVar[bool] = False
    translates: ClassVar[bool] = True
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("source",), ("text",))
    Options: ClassVar[type] = Seq2SeqOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        return text_problem(layout, row, "source", "target")

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Source tokens and target labels of every row."""
        if not config.is_encoder_decoder:
            hint = "Choose an encoder-decoder such as T5 or BART; `causal-lm` trains decoders."
            raise recipe.error("base", "name", problem=f"{config.model_type} has no encoder and decoder", hint=hint)
        dataset, cut = self._encode(recipe, train, tokenizer, config)
        plan = Plan(train=dataset, stop_ids={tokenizer.eos_token_id} - {None})
        for side, count in zip(("sources", "targets"), cut):
            if count:
                plan.notes.append(f"{count} of {len(train)} training {side} are cut.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Source tokens and target labels of the test rows."""
        plan.test, _ = self._encode(recipe, test, tokenizer, config)
        if recipe.eval.generate:
            pairs = zip(test.dataset["source"][:], test.dataset["target"][:], strict=True)
            plan.examples = [(source.strip(), target.strip()) for source, target in pairs]
            text_scores.check_metric(recipe.eval, [target for _, target in plan.examples])

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The model's own loss over the target's tokens."""
        from veneer.train.loss import own_loss

        return own_loss(model, batch, items, shifted=False)

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The decoder's scores; it is given the target, so the labels go in."""
        return model(**batch).logits

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """Half of a row's tokens through the encoder, half through the decoder."""
        from veneer.train.meta_loss import decoder_loss

        return decoder_loss(model, rows, max(1, tokens // 2))

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """Loss on the test rows, and the texts that the model writes for them."""
        import torch

        from veneer.train.collate import batches
        from veneer.train.generate import evaluating

        assert plan.test is not None
        device = next(model.parameters()).device
        total, count = 0.0, 0.0
        with evaluating(model):
            for _, batch in batches(plan.test, self.collator(tokenizer), recipe.eval.batch_size, device):
                total += float(self.loss(model, batch, torch.tensor(1.0, device=device)))
                count += int((batch["labels"] != IGNORE).sum())
        total, count = summed(total, count)
        if not plan.examples:
            return Outcome({"loss": total / count}, [], [])
        longest = max(len(row) for row in plan.test["labels"][:])
        limit = recipe.eval.max_new_tokens or longest + longest // 4 + 8
        texts = self.write(model, tokenizer, plan.test["input_ids"][:], limit, recipe.eval.batch_size)
        expected = [target for _, target in plan.examples]
        scores, right = text_scores.answer_scores(recipe.eval.metric, expected, texts, written=True)
        return Outcome(scores | {"loss": total / count}, texts, right)

    def write(
        self, model: torch.nn.Module, tokenizer: Any, sources: list[list[int]], max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """The text that the model writes for each source."""
        from veneer.train.generate import translate

        rows = translate(model, sources, tokenizer.pad_token_id, max_new_tokens, self.options.num_beams, batch_size)
        return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`text`: what the model writes."""
        limit = token_limit(recipe, loaded.tokenizer, loaded.model.config)
        texts = table.dataset[next(iter(table.layout.columns))][:]
        encoded = self.sources(loaded.tokenizer, texts, limit)
        longest = recipe.eval.max_new_tokens or self.options.max_target_length or 256
        size = recipe.eval.batch_size
        written = self.write(loaded.model, loaded.tokenizer, encoded["input_ids"], longest, size)
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
        return [{"text": text} | ({"cut": True} if yes else {}) for text, yes in zip(written, cut, strict=True)]

    def sources(self, tokenizer: Any, texts: list[str], limit: int) -> Any:
        """The encoding of source texts, prefix and all."""
        prefixed = [self.options.source_prefix + text for text in texts]
        return tokenizer(prefixed, truncation=True, max_length=limit, return_attention_mask=False, verbose=False)

    def _encode(self, recipe: Recipe, table: Table, tokenizer: Any, config: Any) -> tuple[Any, tuple[int, int]]:
        import datasets

        limit = token_limit(recipe, tokenizer, config)
        longest = min(self.options.max_target_length or limit, limit)
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
        cut = [0, 0]

        def encode(first: int, last: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
            batch = table.dataset[first:last]
            source = self.sources(tokenizer, batch["source"], limit)
            target = tokenizer(text_target=batch["target"], truncation=True, max_length=longest, verbose=False)
            labels = [_ended(row, tokenizer.eos_token_id, longest) for row in target["input_ids"]]
            over = [sum(bool(encoding.overflowing) for encoding in out.encodings) for out in (source, target)]
            return source["input_ids"], labels, over

        for ids, labels, over in in_batches(len(table), encode, table.workers):
            cut = [before + more for before, more in zip(cut, over)]
            columns["input_ids"] += ids
            columns["labels"] += labels
        pairs = zip(columns["input_ids"], columns["labels"], strict=True)
        columns["length"] = [len(source) + len(target) for source, target in pairs]
        return datasets.Dataset.from_dict(columns), (cut[0], cut[1])


def _ended(row: list[int], eos: int | None, limit: int) -> list[int]:
    """A target that fits learns to stop, whether or not the tokenizer writes the end by itself."""
    return row if eos is None or row[-1:] == [eos] or len(row) >= limit else [*row, eos]
