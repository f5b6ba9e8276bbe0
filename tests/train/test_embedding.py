"""`embedding`: vectors, losses by their formulas, rankings, and runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import plan_of, recipe_for, write_jsonl
from transformers import AutoModel, AutoTokenizer

from veneer.train import DataError, RecipeError, run
from veneer.train.tasks.base import Plan as PlanClass
from veneer.train.tasks.embedding import Embedding, EmbeddingOptions, _retrieval

TRIPLES = [
    {"anchor": "anna", "positive": "in paris", "negative": "in rome"},
    {"anchor": "bob", "positive": "in rome", "negative": "the par"},
    {"anchor": "the", "positive": "the par", "negative": "in paris"},
]
PAIRS = [{key: row[key] for key in ("anchor", "positive")} for row in TRIPLES]
SCORED = [{**row, "score": score} for row, score in zip(PAIRS, (0.9, 0.1, 0.5))]


recipe_of = partial(recipe_for, "embedding")


def batch_of(rows: list[dict[str, Any]], base: Path, tmp_path: Path, task: Embedding) -> dict[str, torch.Tensor]:
    plan = plan_of(recipe_of(write_jsonl(tmp_path / "rows.jsonl", rows), base))
    return task.collator(AutoTokenizer.from_pretrained(base))(plan.train.to_list())


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_vector_does_not_hang_on_its_batch(pooling: Any, bert: Path, tmp_path: Path) -> None:
    task = Embedding(EmbeddingOptions(pooling=pooling))
    model = AutoModel.from_pretrained(bert).eval()
    rows = [{"anchor": "anna in paris . the bob", "positive": "bob"}, {"anchor": "rome", "positive": "in par"}]
    together = task.embed(model, batch_of(rows, bert, tmp_path, task))
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert together.norm(dim=-1).tolist() == pytest.approx([1.0] * 4)
    for vector, text in zip(together, [text for row in rows for text in row.values()], strict=True):
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        alone = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, alone / alone.norm(), rtol=1e-4, atol=1e-5)


def test_infonce_by_its_formula(bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(bert).eval()
    for rows, both in ((PAIRS, False), (PAIRS, True), (TRIPLES, False)):
        task = Embedding(EmbeddingOptions(scale=5.0, both_ways=both))
        batch = batch_of(rows, bert, tmp_path, task)
        sides = task.embed(model, batch).unflatten(0, (3, -1))
        total = 0.0
        for i in range(3):
            others = [(j, side) for j in range(3) for side in range(1, sides.shape[1])]
            texts = {(j, side): list(rows[j].values())[side] for j, side in others}
            kept = [key for key in others if key == (i, 1) or texts[key] != texts[i, 1]]
            scores = torch.stack([5.0 * sides[i, 0] @ sides[key] for key in kept])
            forth = scores.logsumexp(0) - 5.0 * sides[i, 0] @ sides[i, 1]
            back = (5.0 * sides[:, 0] @ sides[i, 1]).logsumexp(0) - 5.0 * sides[i, 0] @ sides[i, 1]
            total += float((forth + back) / 2 if both else forth)
        assert float(task.loss(model, batch, None)) == pytest.approx(total / 3, rel=1e-4)
        assert float(task.loss(model, batch, torch.tensor(6))) == pytest.approx(total / 6, rel=1e-4)


def test_equal_texts_are_no_negatives(bert: Path, tmp_path: Path) -> None:
    task = Embedding()
    model = AutoModel.from_pretrained(bert).eval()
    twice = [PAIRS[0], PAIRS[0]]
    assert float(task.loss(model, batch_of(twice, bert, tmp_path, task), None)) == pytest.approx(0.0, abs=1e-6)
    same_anchor = [PAIRS[0], {"anchor": "anna", "positive": "bob"}]
    assert float(task.loss(model, batch_of(same_anchor, bert, tmp_path, task), None)) == pytest.approx(0.0, abs=1e-6)


def test_triplet_and_score_losses(bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(bert).eval()
    task = Embedding(EmbeddingOptions(loss="triplet", margin=0.7))
    batch = batch_of(TRIPLES, bert, tmp_path, task)
    sides = task.embed(model, batch).unflatten(0, (3, 3))
    gaps = [float(row[0] @ row[2] - row[0] @ row[1]) + 0.7 for row in sides]
    assert float(task.loss(model, batch, None)) == pytest.approx(sum(max(0.0, gap) for gap in gaps) / 3, rel=1e-4)
    batch = batch_of(SCORED, bert, tmp_path, task)
    sides = task.embed(model, batch).unflatten(0, (3, 2))
    want = sum((float(row[0] @ row[1]) - score) ** 2 for row, score in zip(sides, (0.9, 0.1, 0.5))) / 3
    assert float(task.loss(model, batch, None)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "options", "best"),
    [
        (PAIRS, {}, "recall_at_1"),
        (TRIPLES, {"loss": "triplet"}, "triplet_accuracy"),
        (SCORED, {"pooling": "cls"}, "spearman"),
    ],
)
def test_runs_learn(rows: Any, options: Any, best: str, bert: Path, tmp_path: Path) -> None:
    train = {"learning_rate": 0.01, "num_train_epochs": 30, "per_device_train_batch_size": 4, "use_cpu": True}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = run(recipe_of(path, bert, train=train, options=options))
    assert result.after[best] == pytest.approx(1.0)
    assert result.history[-1]["loss"] < 0.3 * result.history[0]["loss"]
    if best == "recall_at_1":
        assert [sample.tuned for sample in result.samples] == ["in paris", "in rome", "the par"]


def test_ranking_counts_equal_texts_once() -> None:
    plan = PlanClass(train=None, examples=[("a", "x"), ("b", "x"), ("c", "y"), ("d", "z")])  # type: ignore[arg-type]
    axes = torch.eye(4)
    near = torch.stack([axes[0], axes[0], axes[1], axes[2]])
    # c is nearest to x (twice there), then to its own y; d is nearest to y, then x, then its own z
    third, fourth = 0.9 * axes[0] + 0.5 * axes[1], 0.9 * axes[1] + 0.5 * axes[0] + 0.1 * axes[2]
    anchors = torch.stack([axes[0], axes[0], third, fourth])
    outcome = _retrieval(plan, torch.stack([anchors, near], 1))
    assert outcome.metrics["recall_at_1"] == 0.5
    assert outcome.metrics["mrr"] == pytest.approx((1 + 1 + 1 / 2 + 1 / 3) / 4)
    assert outcome.outputs == ["x", "x", "x", "y"]


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"anchor": "a", "positive": ""}, {}, "'positive' is empty"),
        ({"anchor": "a", "positive": "b", "score": 5}, {}, "expected a cosine"),
        ({"anchor": "a", "positive": "b", "score": "x"}, {}, "expected a cosine"),
        ({"anchor": "a", "positive": "b"}, {"loss": "triplet"}, "triplets need negatives"),
    ],
)
def test_bad_rows(row: Any, options: Any, words: str, bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises((DataError, RecipeError), match=words):
        plan_of(recipe_of(path, bert, options=options))
