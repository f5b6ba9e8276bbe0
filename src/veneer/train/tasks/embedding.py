"""`embedding`: texts as vectors, near where they belong together: pairs, triplets, or pairs with a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from veneer.train import label_scores
from veneer.train.data import Layout, Table
from veneer.train.processes import merged
from veneer.train.tasks.base import Outcome, Plan, Task, predict_logits, text_problem, token_limit
from veneer.train.tokens import encode_texts

if TYPE_CHECKING:
    import torch

    from veneer.train.meta_loss import Loss
    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["Embedding", "EmbeddingOptions"]

_SIDES = ("anchor", "positive", "negative")


@dataclass
class EmbeddingOptions:
    """pooling: a text's vector is the mean over its tokens, its first token or its last. scale: of the cosines in
    the softmax over a batch (1 / temperature). both_ways: find the anchor for each positive too. loss: `infonce`
    takes the other rows of a batch as negatives (van den Oord et al. 2018), `triplet` each row's own, at a
    ``margin`` of cosine. Rows with a score are trained on the squared error of the cosine.
    """

    pooling: Literal["mean", "cls", "last"] = "mean"
    loss: Literal["infonce", "triplet"] = "infonce"
    scale: float = 20.0
    margin: float = 0.3
    both_ways: bool = False

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")
        if not 0 < self.margin <= 2:
            raise ValueError(f"margin lies above 0 and at most 2, got {self.margin}")


class Embedding(Task):
    """Contrastive training of sentence vectors, compared by cosine."""

    name: ClassVar[str] = "embedding"
    task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    auto_class: ClassVar[str] = "AutoModel"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (_SIDES, ("anchor", "positive", "score"), _SIDES[:2])
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "anchor": ("query", "sentence1", "text"),
        "positive": ("sentence2", "text_pair"),
        "score": ("similarity",),
    }
    pipeline: ClassVar[str] = "feature-extraction"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-4, "per_device_train_batch_size": 32}
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("anchor",),)
    smooths: ClassVar[bool] = False
    Options: ClassVar[type] = EmbeddingOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        if "score" in row:
            value = row["score"]
            good = isinstance(value, int | float | str) and not isinstance(value, bool)
            if not good or (number := _number(value)) is None or not -1 <= number <= 1:
                return f"{layout.columns['score']!r} is {value!r}, expected a cosine from -1 to 1"
        return text_problem(layout, row, *_SIDES)

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """Tokens of every text."""
        if self.options.loss == "triplet" and "negative" not in train.layout.columns:
            hint = "Give a `negative` column, or set `options.loss: infonce`."
            raise recipe.error("options", "loss", problem="triplets need negatives", hint=hint)
        limit = token_limit(recipe, tokenizer, config)
        dataset, cut = _encode(train, tokenizer, limit)
        plan = Plan(train=dataset)
        if cut:
            plan.notes.append(f"{cut} texts of the training rows are cut to {limit} tokens.")
        return plan

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Tokens of the test rows' texts."""
        limit = token_limit(recipe, tokenizer, config)
        plan.test, _ = _encode(test, tokenizer, limit)
        plan.examples = list(zip(test.dataset["anchor"][:], test.dataset["positive"][:], strict=True))

    def collator(self, tokenizer: Any, multiple_of: int = 1, seed: int = 0) -> Any:
        """The texts of a row one after the other."""
        from veneer.train.collate import Collator, GroupCollator

        return GroupCollator(Collator(tokenizer.pad_token_id, multiple_of), _SIDES)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The mean loss of the rows."""
        import torch.nn.functional as F

        rows = len(batch["labels"])
        vectors = self.embed(model, batch).unflatten(0, (rows, -1))  # (rows, sides, d)
        if batch["labels"].is_floating_point():
            each = ((vectors[:, 0] * vectors[:, 1]).sum(-1) - batch["labels"]) ** 2
        elif self.options.loss == "triplet":
            near, far = ((vectors[:, 0] * vectors[:, side]).sum(-1) for side in (1, 2))
            each = F.relu(far - near + self.options.margin)
        else:
            each = self._infonce(vectors, batch["input_ids"].unflatten(0, (rows, -1)))
        return each.sum() / (rows if items is None else items)

    def _infonce(self, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each anchor's positive among all positives and negatives of the batch, (rows,).

        A candidate with the positive's very tokens, or that belongs to an anchor with the anchor's, is no negative.
        """
        import torch
        import torch.nn.functional as F

        rows = len(vectors)
        candidates = vectors[:, 1:].transpose(0, 1).flatten(0, 1)  # positives, then negatives
        texts = ids[:, 1:].transpose(0, 1).flatten(0, 1)
        same = (texts[None] == ids[:, 1, None]).all(-1)
        same[:, :rows] |= (ids[None, :, 0] == ids[:, None, 0]).all(-1)
        target = torch.arange(rows, device=vectors.device)
        same[target, target] = False
        scores = self.options.scale * vectors[:, 0] @ candidates.T
        each = F.cross_entropy(scores.masked_fill(same, float("-inf")), target, reduction="none")
        if not self.options.both_ways:
            return each
        back = scores[:, :rows].masked_fill(same[:, :rows], float("-inf")).T
        return (each + F.cross_entropy(back, target, reduction="none")) / 2

    def embed(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The vector of each text, of length 1, (texts, d), float32."""
        import torch
        from torch.nn.functional import normalize

        out = model(**{key: value for key, value in batch.items() if key != "labels"}).last_hidden_state
        mask = batch["attention_mask"]
        hidden = out[:, -mask.shape[1] :].float()  # virtual tokens of a prompt method come first
        if self.options.pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            first = self.options.pooling == "cls"
            place = torch.zeros_like(mask[:, 0]) if first else mask.sum(1) - 1
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), place]
        return normalize(pooled, dim=-1)

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`embedding`: the text's vector, of length 1."""
        rows = predict_logits(loaded, table, recipe, ("anchor",), self.embed)
        return [{"embedding": vector.tolist()} | ({"cut": True} if cut else {}) for vector, cut in rows]

    def read(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The hidden states; a pooler's output is not looked at."""
        return [model(**batch).last_hidden_state]

    def meta_loss(self, model: Any, rows: int, tokens: int, labelled: float) -> Loss:
        """Two texts a row, or three."""
        from veneer.train.meta_loss import outputs_loss

        return outputs_loss(model, (3 if self.options.loss == "triplet" else 2) * rows, tokens)

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """How often each anchor's positive is the nearest of all, or how the cosines follow the scores."""
        import torch

        from veneer.train.collate import batches
        from veneer.train.generate import evaluating

        assert plan.test is not None
        device = next(model.parameters()).device
        rows: list[Any] = [None] * len(plan.test)
        with evaluating(model):
            for part, batch in batches(plan.test, self.collator(tokenizer), recipe.eval.batch_size, device):
                vectors = self.embed(model, batch).unflatten(0, (len(part), -1)).cpu()
                for number, row in zip(part, vectors, strict=True):
                    rows[number] = row
        vectors = torch.stack(merged(rows))
        wanted = torch.tensor(plan.test["labels"][:])
        if wanted.is_floating_point():
            found = (vectors[:, 0] * vectors[:, 1]).sum(-1)
            close = (found - wanted).abs() < 0.1
            scores = label_scores.number_scores(wanted, found)
            return Outcome(scores, [positive for _, positive in plan.examples], close.tolist())
        return _retrieval(plan, vectors)


def _retrieval(plan: Plan, vectors: torch.Tensor) -> Outcome:
    """Rank all positives for each anchor; equal texts count as one."""
    import torch

    texts = [positive for _, positive in plan.examples]
    kinds = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    places = torch.tensor([kinds[text] for text in texts])
    scores = vectors[:, 0] @ vectors[:, 1].T
    own = scores.diagonal()
    # the rank among different texts: each text counts once, by its best cosine
    best = torch.full((len(texts), len(kinds)), float("-inf"))
    best = best.scatter_reduce(1, places.expand(len(texts), -1), scores, "amax")
    ahead = best > own[:, None]
    ahead[torch.arange(len(texts)), places] = False
    rank = ahead.sum(1)
    metrics = {"recall_at_1": float((rank == 0).float().mean()), "mrr": float((1 / (rank + 1.0)).mean())}
    if vectors.shape[1] > 2:
        far = (vectors[:, 0] * vectors[:, 2]).sum(-1)
        metrics["triplet_accuracy"] = float((own > far).float().mean())
    nearest = [texts[number] for number in scores.argmax(1).tolist()]
    return Outcome(metrics, nearest, [got == want for got, want in zip(nearest, texts, strict=True)])


def _encode(table: Table, tokenizer: Any, limit: int) -> tuple[Any, int]:
    import datasets

    columns: dict[str, list[Any]] = {"length": [0] * len(table), "labels": [0] * len(table)}
    if "score" in table.layout.columns:
        columns["labels"] = [float(value) for value in table.dataset["score"][:]]
    cut = 0
    for side in (side for side in _SIDES if side in table.layout.columns):
        own, more = encode_texts(table, tokenizer, (side,), limit)
        cut += sum(more)
        columns[f"{side}_input_ids"] = own["input_ids"]
        columns["length"] = [max(pair) for pair in zip(columns["length"], own["length"], strict=True)]
    return datasets.Dataset.from_dict(columns), cut


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
