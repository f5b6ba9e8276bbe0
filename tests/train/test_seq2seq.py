"""`seq2seq`: labels, losses, runs on tiny T5 and BART, and scores against their libraries."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import plan_of, recipe_for, write_jsonl
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from veneer.train import RecipeError, run
from veneer.train.encode import IGNORE
from veneer.train.generate import translate
from veneer.train.tasks import task_of
from veneer.train.text_scores import answer_scores, summary_scores, translation_scores

PAIRS = [("one two", "red green"), ("two one", "green red"), ("three", "blue"), ("one three two", "red blue green")]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", [{"source": a, "target": b} for a, b in PAIRS])


recipe_of = partial(recipe_for, "seq2seq", adapter={"r": 16, "lora_alpha": 64, "target_modules": "all-linear"})


def test_sources_have_their_prefix_and_targets_their_end(pairs: Path, t5: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(t5)
    plan = plan_of(recipe_of(pairs, t5, options={"source_prefix": "answer "}))
    for row, (source, target) in zip(plan.train, PAIRS, strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"answer {source}<|im_end|>"
        assert tokenizer.decode(row["labels"]) == f"{target}<|im_end|>"
        assert row["length"] == len(row["input_ids"]) + len(row["labels"])
    assert plan.examples == PAIRS
    short = plan_of(recipe_of(pairs, t5, options={"max_target_length": 2}))
    assert max(len(row["labels"]) for row in short.train) == 2
    assert any("training targets are cut" in note for note in short.notes)


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_the_loss_is_the_models_own(base: str, pairs: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    recipe = recipe_of(pairs, folder)
    task, rows = task_of(recipe), plan_of(recipe).train.to_list()
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    collate = task.collator(AutoTokenizer.from_pretrained(folder))
    batch = collate(rows)
    assert (batch["labels"] == IGNORE).any()
    own = model(**batch).loss
    torch.testing.assert_close(task.loss(model, batch, None), own)
    items = torch.tensor(sum(len(row["labels"]) for row in rows))
    halves = [task.loss(model, collate(part), items) for part in (rows[:1], rows[1:])]
    torch.testing.assert_close(sum(halves), own)


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_runs_learn_to_translate(base: str, pairs: Path, request: pytest.FixtureRequest) -> None:
    train = {
        "learning_rate": 0.005, "num_train_epochs": 90, "per_device_train_batch_size": 4, "use_cpu": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    options = {"num_beams": 2} if base == "bart" else {}
    result = run(recipe_of(pairs, request.getfixturevalue(base), train=train, options=options, merge=True))
    assert result.after["exact_match"] == 1.0 > result.before["exact_match"]
    assert result.after["loss"] < 0.25 * result.before["loss"]
    assert result.after["chrf"] == pytest.approx(1.0)
    assert result.after["rouge1"] == 1.0
    assert result.samples[3].tuned == "red blue green"


def test_batched_answers_equal_single_ones(t5: Path) -> None:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(t5)
    torch.manual_seed(1)
    sources = [torch.randint(3, 300, (n,)).tolist() for n in (7, 2, 5)]
    together = translate(model, sources, 0, 6, 1, 3)
    for source, answer in zip(sources, together, strict=True):
        alone = translate(model, [source], 0, 6, 1, 1)[0]
        assert answer[: len(alone)] == alone


def test_scores_are_those_of_their_libraries() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    want = ["the cat sat on the mat today", "two dogs run fast in the park"]
    got = ["the cat is on the mat today", "dogs ran fast in the park"]
    scores = translation_scores(want, got)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(got, [want]).score / 100)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(got, [want]).score / 100)
    assert 0.1 < scores["bleu"] < scores["chrf"] < 1
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    mean = sum(scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(want, got)) / 2
    assert summary_scores(want, got)["rougel"] == pytest.approx(mean)
    assert set(answer_scores("auto", want, got)[0]) == {"exact_match"}
    assert set(answer_scores("translation", want, got)[0]) == {"chrf", "bleu", "exact_match"}
    assert "field_accuracy" in answer_scores("auto", ['{"a": 1}'], ['{"a": 1}'], written=True)[0]


def test_a_missing_package_is_told(pairs: Path, t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    gone = lambda name, *more: None if name == "sacrebleu" else real(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    with pytest.raises(RecipeError, match=r"need the sacrebleu package.*pip install sacrebleu"):
        plan_of(recipe_of(pairs, t5, eval={"metric": "translation"}))
    assert set(answer_scores("auto", ["a"], ["b"], written=True)[0]) == {"exact_match", "rouge1", "rouge2", "rougel"}


def test_a_decoder_is_refused(pairs: Path, llama: Path) -> None:
    with pytest.raises(RecipeError, match="llama has no encoder and decoder"):
        plan_of(recipe_of(pairs, llama))


def test_label_smoothing_counts_the_decoders_labels(pairs: Path, t5: Path) -> None:
    losses = []
    for size, steps in ((4, 1), (2, 2)):
        train = {
            "max_steps": 2, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "use_cpu": True,
            "label_smoothing_factor": 0.3, "train_sampling_strategy": "sequential", "logging_steps": 1,
        }  # fmt: skip
        recipe = recipe_of(pairs, t5, train=train, data={"train": str(pairs)}, out=str(pairs.parent / f"o{size}"))
        losses.append([row["loss"] for row in run(recipe).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    recipe = recipe_of(pairs, t5)
    task, rows = task_of(recipe), plan_of(recipe).train.to_list()
    batch = task.collator(AutoTokenizer.from_pretrained(t5))(rows)
    logits = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()(**batch).logits
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.3)
    assert losses[0][0] == pytest.approx(float(want.detach()), rel=1e-4)
