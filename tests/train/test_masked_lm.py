"""`masked-lm`: which tokens are masked and how, and a run that learns a domain's words."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import plan_of, recipe_for, write_jsonl
from transformers import AutoModelForMaskedLM, AutoTokenizer

from veneer.train import DataError, RecipeError, run
from veneer.train.encode import IGNORE
from veneer.train.masking import mask_row
from veneer.train.tasks import task_of

TEXTS = ["anna in paris .", "bob in rome .", "anna in paris the bob .", "bob in rome the anna ."]


recipe_of = partial(recipe_for, "masked-lm")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def test_joined_texts_lose_no_token(texts: Path, bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for length in (5, 9, 64):
        plan = plan_of(recipe_of(texts, bert, data={"train": str(texts), "max_length": length}))
        assert all(row["length"] == len(row["input_ids"]) == len(row["words"]) <= length for row in plan.train)
        assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in plan.train)
        joined = [token for row in plan.train for token in row["input_ids"] if token > 3]
        assert joined == [token for text in TEXTS for token in tokenizer(text)["input_ids"][1:-1]]
        if length == 64:  # a row's own end parts two texts where a cut falls between them
            assert plan.train[0]["input_ids"].count(3) == len(TEXTS)
        assert [row["row"] for row in plan.train] == list(range(len(plan.train)))


def test_a_word_is_masked_whole(texts: Path, bert: Path) -> None:
    recipe = recipe_of(texts, bert, options={"join": False})
    plan = plan_of(recipe)
    assert plan.train[0]["words"] == [-1, 0, 0, 1, 2, 2, 3, -1]  # an ##na in par ##is .
    assert [row["row"] for row in plan.test] == [-1, -2, -3, -4]
    pieces = plan_of(recipe_of(texts, bert, options={"join": False, "whole_word": False}))
    assert pieces.train[0]["words"] == [-1, 0, 1, 2, 3, 4, 5, -1]
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        row = plan.train[0]
        _, labels = mask_row(row["input_ids"], row["words"], 0.3, 1, range(4, 14), generator)
        chosen = {word for word, label in zip(row["words"], labels) if label != IGNORE}
        whole = {word for word, label in zip(row["words"], labels) if label == IGNORE}
        assert not chosen & whole
        assert -1 not in chosen
        assert 2 <= sum(label != IGNORE for label in labels) <= 3


def test_shares_of_masked_random_and_kept_tokens() -> None:
    ids, words = list(range(100, 1100)), list(range(1000))
    kinds: Counter[str] = Counter()
    for seed in range(20):
        out, labels = mask_row(ids, words, 0.15, 1, range(5000, 6000), torch.Generator().manual_seed(seed))
        for old, new, label in zip(ids, out, labels, strict=True):
            kind = "plain" if label == IGNORE else {1: "mask", old: "same"}.get(new, "other")
            assert kind != "plain" or new == old
            assert label in (IGNORE, old)
            kinds[kind] += 1
    chosen = 20_000 - kinds["plain"]
    assert chosen == 20 * 150
    shares = [kinds[kind] / chosen for kind in ("mask", "other", "same")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_masks_hang_on_seed_epoch_and_row_alone(texts: Path, bert: Path) -> None:
    recipe = recipe_of(texts, bert, options={"join": False, "mlm_probability": 0.4})
    plan, task, tokenizer = plan_of(recipe), task_of(recipe), AutoTokenizer.from_pretrained(bert)
    first, other = task.collator(tokenizer, seed=1), task.collator(tokenizer, seed=2)
    rows, test = plan.train.to_list(), plan.test.to_list()
    once = first(rows)["input_ids"]
    torch.rand(7)
    assert torch.equal(once, first(rows)["input_ids"])
    assert torch.equal(once[2:3], first(rows[2:3])["input_ids"][:, : once.shape[1]])
    held = first(test)["input_ids"]
    task.begin_epoch(first, 1)
    assert not torch.equal(once, first(rows)["input_ids"])
    assert not torch.equal(once, other(rows)["input_ids"])
    assert torch.equal(held, first(test)["input_ids"])
    assert torch.equal(held, other(test)["input_ids"])


def test_the_loss_is_the_models_own(texts: Path, bert: Path) -> None:
    recipe = recipe_of(texts, bert, options={"mlm_probability": 0.5})
    task, plan = task_of(recipe), plan_of(recipe)
    model: Any = AutoModelForMaskedLM.from_pretrained(bert).eval()
    batch = task.collator(AutoTokenizer.from_pretrained(bert))(plan.train.to_list())
    torch.testing.assert_close(task.loss(model, batch, None), model(**batch).loss)
    torch.testing.assert_close(task.loss(model, batch, torch.tensor(4)) * 4 / (task.items(batch) != IGNORE).sum(),
                               model(**batch).loss)  # fmt: skip


def test_a_run_learns_the_texts(texts: Path, bert: Path) -> None:
    train = {"learning_rate": 0.02, "num_train_epochs": 60, "per_device_train_batch_size": 4, "use_cpu": True}
    result = run(recipe_of(texts, bert, train=train, options={"join": False}, merge=True))
    assert result.after["loss"] < 0.7 * result.before["loss"]
    assert result.after["accuracy"] > result.before["accuracy"]
    assert "[MASK]" in result.samples[0].prompt
    assert result.after["perplexity"] == pytest.approx(torch.tensor(result.after["loss"]).exp().item(), rel=1e-4)


def test_what_cannot_be_masked_is_refused(texts: Path, bert: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no mask token"):
        plan_of(recipe_of(texts, llama))
    with pytest.raises(RecipeError, match="mlm_probability must lie between 0 and 1"):
        recipe_of(texts, bert, options={"mlm_probability": 1.0})
    empty = write_jsonl(tmp_path / "e.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="'text' is empty"):
        plan_of(recipe_of(empty, bert))
