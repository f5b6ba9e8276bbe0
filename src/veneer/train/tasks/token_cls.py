"""`token-cls`: a label a word, learned at the word's first sub-word and scored by entity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.train import metrics
from veneer.train.batched import in_batches
from veneer.train.class_weights import Asked, label_weights
from veneer.train.data import Layout, Table
from veneer.train.encode import IGNORE
from veneer.train.entities import spans, tag_words, words_of
from veneer.train.errors import nearest
from veneer.train.processes import merged
from veneer.train.schemes import breaks, scheme_of, tags_are_entities
from veneer.train.tasks.base import Outcome, Plan, Task, text_problem, token_limit

if TYPE_CHECKING:
    import torch

    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["TokenCls", "align"]


@dataclass
class TokenClsOptions:
    """class_weights: `balanced` weighs a label by how rare it is, or weights by label."""

    class_weights: Asked = None


class TokenCls(Task):
    """Word labels aligned to sub-words; the new classification head is trained and saved with the adapter."""

    name: ClassVar[str] = "token-cls"
    task_type: ClassVar[str] = "TOKEN_CLS"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (("tokens", "labels"),)
    pipeline: ClassVar[str] = "token-classification"
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3, "per_device_train_batch_size": 16}
    metrics: ClassVar[tuple[str, ...]] = ("auto", "entities", "accuracy")
    whole_words: ClassVar[bool] = True
    asks: ClassVar[tuple[tuple[str, ...], ...]] = (("tokens",), ("text",))
    named_labels: ClassVar[bool] = True
    Options: ClassVar[type] = TokenClsOptions

    def check_row(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with a row, or an empty string."""
        for role in ("tokens", "labels"):
            value, column = row[role], layout.columns[role]
            if not isinstance(value, list):
                return f"{column!r} is {type(value).__name__}, expected a list with one text a word"
            if not value:
                return f"{column!r} is empty"
            odd = next((i for i, item in enumerate(value) if not isinstance(item, str) or not item.strip()), None)
            if odd is not None:
                return f"{column!r} holds {value[odd]!r} at word {odd + 1}, expected text"
        words, labels = len(row["tokens"]), len(row["labels"])
        return "" if words == labels else f"{words} tokens and {labels} labels"

    def plan_train(self, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Plan:
        """The labels found in training, and the tokens and labels of every row."""
        names = _label_names(train, config)
        limit = token_limit(recipe, tokenizer, config)
        everywhere = recipe.data.label_all_subwords
        asked = self.options.class_weights
        found = (label for row in train.dataset["labels"] for label in row)
        weights = {} if asked is None else label_weights(recipe, asked, found, names)
        dataset, _, cut = _encode(train, names, tokenizer, limit, everywhere, weights)
        plan = Plan(train=dataset, label_names=names)
        if cut:
            plan.notes.append(f"{cut} of {len(train)} training rows are cut to {limit} tokens.")
        if _metric(recipe, names) == "entities":
            plan.notes.append(f"The labels are read as {_scheme(recipe, train)}; scores are of whole entities.")
        return plan

    def row_warnings(self, recipe: Recipe, plan: Plan, train: Table, test: Table | None) -> list[str]:
        """Labels that break the scheme of the training rows, with the first of them."""
        if _metric(recipe, plan.label_names or []) != "entities":
            return []
        scheme = _scheme(recipe, train)
        return [text for table in (train, test) if table is not None for text in _broken(table, scheme)]

    def more_rows(self, plan: Plan, recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> Any:
        """Tokens and labels under the plan's label names."""
        assert plan.label_names is not None
        limit, everywhere = token_limit(recipe, tokenizer, config), recipe.data.label_all_subwords
        weights = label_weights(recipe, self.options.class_weights, [], plan.label_names)
        return _encode(train, plan.label_names, tokenizer, limit, everywhere, weights)[0]

    def plan_test(self, plan: Plan, recipe: Recipe, test: Table, tokenizer: Any, config: Any) -> None:
        """Tokens and labels of the test rows, and where each word begins."""
        assert plan.label_names is not None
        names, limit = plan.label_names, token_limit(recipe, tokenizer, config)
        plan.test, places, cut = _encode(test, names, tokenizer, limit, recipe.data.label_all_subwords)
        if cut:
            plan.notes.append(f"{cut} of {len(test)} test rows are cut; the words cut off count as O.")
        rows = test.dataset.to_list()
        plan.targets = [(row["tokens"], row["labels"], place) for row, place in zip(rows, places, strict=True)]
        plan.examples = [(" ".join(row["tokens"]), metrics.spans(row["tokens"], row["labels"])) for row in rows]
        if _metric(recipe, names) == "entities":
            metrics.need_seqeval()

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], items: torch.Tensor | None) -> torch.Tensor:
        """The model's own loss over the labelled sub-words; each by its label's weight where there are any."""
        from torch.nn.functional import cross_entropy

        from veneer.train.loss import own_loss

        if "weights" not in batch:
            return own_loss(model, batch, items, shifted=False)
        weights, labels = batch["weights"].flatten(), batch["labels"].flatten()
        logits = self.logits(model, batch).flatten(0, 1).float()
        each = cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE) * weights
        return each.sum() / ((labels != IGNORE).sum() if items is None else items)

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores of every sub-word's labels, (rows, length, labels)."""
        return super().logits(model, {key: value for key, value in batch.items() if key != "weights"})

    def evaluate(self, model: torch.nn.Module, tokenizer: Any, plan: Plan, recipe: Recipe) -> Outcome:
        """The most likely label of each word's first sub-word, scored by entity (or by word)."""
        assert plan.test is not None
        assert plan.label_names is not None
        best = _best_labels(model, tokenizer, plan, recipe.eval.batch_size)
        blank = "O" if "O" in plan.label_names else plan.label_names[0]
        found: list[list[str]] = []
        for (words, _, places), row in zip(plan.targets, best, strict=True):
            tags = [blank] * len(words)
            for word, place in places:
                tags[word] = plan.label_names[row[place]]
            found.append(tags)
        expected = [labels for _, labels, _ in plan.targets]
        if _metric(recipe, plan.label_names) == "entities":
            scores = metrics.entity_scores(expected, found)
        else:
            scores = {"accuracy": metrics.accuracy(expected, found)}
        shown = [metrics.spans(words, tags) for (words, _, _), tags in zip(plan.targets, found, strict=True)]
        return Outcome(scores, shown, [want == got for want, got in zip(expected, found, strict=True)])

    def check_ask(self, layout: Layout, row: dict[str, Any]) -> str:
        """What is wrong with words or a text that are to be labelled, or an empty string."""
        if "text" in row:
            return text_problem(layout, row, "text")
        words = row["tokens"]
        good = isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)
        return "" if good else f"{layout.columns['tokens']!r} is not a list with one text a word"

    def predict(self, loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
        """`entities` with their text, label, place and score: characters of a text, or words of a list of them.

        A list of words gets `labels` too. However long a row is, no word is left out.
        """
        limit = token_limit(recipe, loaded.tokenizer, loaded.model.config)
        whole = "text" in table.layout.columns
        rows = table.dataset["text" if whole else "tokens"][:]
        places = [words_of(text) if whole else [] for text in rows]
        words = [[text[a:b] for a, b in own] if whole else text for text, own in zip(rows, places, strict=True)]
        tagged = tag_words(loaded.model, loaded.tokenizer, words, limit, recipe.eval.batch_size)
        answers: list[dict[str, Any]] = []
        for row, own, tags in zip(rows, places, tagged, strict=True):
            groups = []
            for first, last, kind in spans([label for label, _ in tags]):
                start, end = (own[first][0], own[last - 1][1]) if whole else (first, last)
                text = row[start:end] if whole else " ".join(row[first:last])
                score = sum(share for _, share in tags[first:last]) / (last - first)
                groups.append({"text": text, "label": kind, "start": start, "end": end, "score": score})
            answers.append({"entities": groups} | ({} if whole else {"labels": [label for label, _ in tags]}))
        return answers


def _metric(recipe: Recipe, names: Sequence[str]) -> str:
    metric = recipe.eval.metric
    if metric == "auto":
        return "entities" if tags_are_entities(names) else "accuracy"
    if metric == "entities" and not tags_are_entities(names):
        hint = "Entities are O, B-name, I-name (or in IOE, IOBES, BILOU); set `eval.metric: accuracy` for other labels."
        raise recipe.error("eval", "metric", problem=f"the labels are {', '.join(names)}", hint=hint)
    return metric


def _scheme(recipe: Recipe, train: Table) -> str:
    try:
        return scheme_of(train.dataset["labels"][:])
    except ValueError as error:
        hint = "Write them in one scheme, or set `eval.metric: accuracy`."
        raise recipe.error("eval", "metric", problem=str(error), hint=hint) from None


def _broken(table: Table, scheme: str) -> list[str]:
    """What is said of labels that break a scheme, with three examples."""
    rows = ((row, labels, breaks(labels, scheme)) for row, labels in enumerate(table.dataset["labels"]))
    wrong = [(row, labels, places) for row, labels, places in rows if places]
    if not wrong:
        return []
    shown = []
    for row, labels, places in wrong[:3]:
        i, words = places[0], table.dataset["tokens"][row]
        around = " ".join(labels[max(0, i - 1) : i + 2])
        shown.append(f"{table.places[row]}, word {i + 1} ({words[i]!r}), {labels[i]} in `{around}`")
    number = sum(len(places) for _, _, places in wrong)
    what = f"{number:,} label{'' if number == 1 else 's'} in {len(wrong):,} of {len(table):,} rows"
    return [f"{what} of {table.path.name} {'breaks' if number == 1 else 'break'} {scheme}: {'; '.join(shown)}."]


def _label_names(train: Table, config: Any) -> list[str]:
    """The labels in the training rows, `O` first; a base with the same labels keeps its own order."""
    names = {label for row in train.dataset["labels"] for label in row}
    known = [config.id2label[index] for index in sorted(config.id2label)] if config.id2label else []
    if set(known) == names and len(known) == len(names):
        return known
    return sorted(names, key=lambda name: (name != "O", name))


def align(
    word_ids: Sequence[int | None], labels: Sequence[int], everywhere: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Word labels spread over sub-words: the first sub-word of each word is labelled, the others IGNORE.

    ``word_ids`` gives each sub-word's word (None for a special token). With ``everywhere`` all sub-words of a
    word are labelled, a `B-x` going on as `I-x` being left to the caller's labels. Returns the labels and the
    (word, place) of every first sub-word.
    """
    spread, first, before = [IGNORE] * len(word_ids), [], None
    for place, word in enumerate(word_ids):
        if word is None:
            continue
        if word != before:
            first.append((word, place))
        if word != before or everywhere:
            spread[place] = labels[word]
        before = word
    return spread, first


def _encode(
    table: Table,
    names: Sequence[str],
    tokenizer: Any,
    limit: int,
    everywhere: bool,
    weights: dict[str, float] | None = None,
) -> tuple[Any, list[list[tuple[int, int]]], int]:
    import datasets

    index = {name: number for number, name in enumerate(names)}
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    places: list[list[tuple[int, int]]] = []
    cut = 0

    def encode(first: int, last: int) -> list[tuple[list[int], list[int], list[tuple[int, int]], bool]]:
        batch = table.dataset[first:last]
        out = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=limit)
        rows = []
        for number, labels in enumerate(batch["labels"]):
            _check_labels(table, first + number, batch["tokens"][number], labels, index)
            numbers = [index[label] for label in labels]
            spread, where = align(out.word_ids(number), numbers, everywhere)
            if not where:
                raise table.error(first + number, "no word of it becomes a token")
            rows.append((out["input_ids"][number], spread, where, out.encodings[number].overflowing != []))
        return rows

    for ids, spread, where, over in itertools.chain.from_iterable(in_batches(len(table), encode, table.workers)):
        cut += over
        places.append(where)
        columns["input_ids"].append(ids)
        columns["labels"].append(spread)
        columns["length"].append(len(spread))
        if weights:
            found = [0.0 if label == IGNORE else weights[names[label]] for label in spread]
            columns.setdefault("weights", []).append(found)
    return datasets.Dataset.from_dict(columns), places, cut


def _check_labels(table: Table, row: int, words: Sequence[str], labels: Sequence[str], known: dict[str, int]) -> None:
    for place, label in enumerate(labels):
        if label not in known:
            near = nearest(label, known)
            meant = f" Did you mean `{near}`?" if near else ""
            hint = f"The training rows have the labels {', '.join(known)}.{meant}"
            raise table.error(row, f"unknown label {label!r} at word {place + 1} ({words[place]!r})", hint)


def _best_labels(model: Any, tokenizer: Any, plan: Plan, batch_size: int) -> list[list[int]]:
    from veneer.train.collate import Collator, batches
    from veneer.train.generate import evaluating

    assert plan.test is not None
    device = next(model.parameters()).device
    best: list[list[int] | None] = [None] * len(plan.test)
    with evaluating(model):
        for part, batch in batches(plan.test, Collator(tokenizer.pad_token_id), batch_size, device):
            batch.pop("labels")
            logits = model(**batch).logits
            logits = logits[:, -batch["input_ids"].shape[1] :]  # virtual tokens come first and have no word
            for number, row in zip(part, logits.argmax(-1).tolist(), strict=True):
                best[number] = row
    return merged(best)
