"""`dpo` and `reward`: what of a pair is learned, the losses by their formulas, and runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import plan_of, recipe_for, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer import LoraConfig, get_peft_model
from veneer.train import DataError, RecipeError, run
from veneer.train.encode import IGNORE
from veneer.train.tasks import task_of
from veneer.train.tasks.dpo import DPO, DPOOptions, answer_log_probs

USER, YES, NO = (
    {"role": "user", "content": "colour"},
    {"role": "assistant", "content": "red"},
    {"role": "assistant", "content": "blue green"},
)
FORMS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "colour ", "chosen": "red", "rejected": "blue green"},
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "whole": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "prompt and whole": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "turns": {"chosen": [USER, NO, USER, YES], "rejected": [USER, NO, USER, NO]},
    "answers": {"prompt": [USER], "chosen": "red", "rejected": "blue green"},
}


def recipe_of(path: Path, base: Path, task: str = "dpo", **more: Any) -> Any:
    return recipe_for(task, path, base, **more)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = []
    for i in range(12):
        user = {"role": "user", "content": f"colour {i % 3}"}
        made.append({"prompt": [user], "chosen": [YES], "rejected": [NO if i % 2 else {**NO, "content": "green"}]})
    return write_jsonl(tmp_path / "pairs.jsonl", made)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_answers_are_learned(form: str, llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    plan = plan_of(recipe_of(write_jsonl(tmp_path / "a.jsonl", [FORMS[form]]), llama))
    row = plan.train[0]
    for side, answer in (("chosen", "red"), ("rejected", "blue green")):
        labels = [label for label in row[f"{side}_labels"] if label != IGNORE]
        assert tokenizer.decode(labels) == f"{answer}<|im_end|>"
        assert len(row[f"{side}_labels"]) == len(row[f"{side}_input_ids"]) <= row["length"]
    starts = [next(i for i, x in enumerate(row[f"{side}_labels"]) if x != IGNORE) for side in ("chosen", "rejected")]
    assert row["chosen_input_ids"][: starts[0]] == row["rejected_input_ids"][: starts[1]]
    assert (plan.examples[0], plan.targets[0]) == (("colour", "red"), "blue green")


def test_log_probabilities_are_the_models_own(rows: Path, llama: Path) -> None:
    recipe = recipe_of(rows, llama)
    model: Any = AutoModelForCausalLM.from_pretrained(llama).eval()
    batch = task_of(recipe).collator(AutoTokenizer.from_pretrained(llama))(plan_of(recipe).train.to_list()[:4])
    assert len(batch["input_ids"]) == 8
    found = answer_log_probs(model, batch)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    scores = model(**inputs).logits.log_softmax(-1)
    for row, total in enumerate(found):
        places = (batch["labels"][row] != IGNORE).nonzero()[:, 0]
        by_hand = sum(scores[row, place - 1, batch["labels"][row, place]] for place in places.tolist())
        torch.testing.assert_close(total, by_hand)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, lambda gap: -math.log(1 / (1 + math.exp(-0.1 * gap)))),
        ({"beta": 0.5, "loss_type": "hinge"}, lambda gap: max(0.0, 1 - 0.5 * gap)),
        ({"beta": 0.5, "loss_type": "ipo"}, lambda gap: (gap - 1.0) ** 2),
        (
            {"beta": 1.0, "label_smoothing": 0.2},
            lambda gap: -0.8 * math.log(1 / (1 + math.exp(-gap))) - 0.2 * math.log(1 / (1 + math.exp(gap))),
        ),
    ],
)
def test_losses_by_their_formulas(options: Any, formula: Any, rows: Path, llama: Path) -> None:
    """Against a second, untouched copy of the base as the reference."""
    recipe = recipe_of(rows, llama)
    task = DPO(DPOOptions(**options))
    base: Any = AutoModelForCausalLM.from_pretrained(llama).eval()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_dropout=0.3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).eval()
    batch = task.collator(AutoTokenizer.from_pretrained(llama))(plan_of(recipe).train.to_list()[:3])
    gains = answer_log_probs(model, batch) - answer_log_probs(base, batch)
    gaps = (gains[::2] - gains[1::2]).tolist()
    assert max(abs(gap) for gap in gaps) > 0.05
    want = sum(formula(gap) for gap in gaps)
    assert float(task.loss(model, batch, None)) == pytest.approx(want / 3, rel=1e-4)
    assert float(task.loss(model, batch, torch.tensor(6))) == pytest.approx(want / 6, rel=1e-4)
    assert (task.items(batch) != IGNORE).sum() == 3
    model.train()
    task.loss(model, batch, None)
    assert model.training
    assert not any(module.training for module in base.modules())


def test_the_chosen_answers_own_loss_can_join(rows: Path, llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama).eval()
    rows_ = plan_of(recipe_of(rows, llama)).train.to_list()[:1]
    batch = DPO().collator(AutoTokenizer.from_pretrained(llama))(rows_)
    chosen = {name: tensor[:1] for name, tensor in batch.items()}
    both = DPO(DPOOptions(sft_weight=2.0)).loss(model, batch, None)
    torch.testing.assert_close(both, DPO().loss(model, batch, None) + 2.0 * model(**chosen).loss)
    assert float(DPO().loss(model, batch, None)) == pytest.approx(math.log(2))


def test_a_dpo_run_learns_the_preference(rows: Path, llama: Path) -> None:
    train = {
        "learning_rate": 0.01, "num_train_epochs": 6, "per_device_train_batch_size": 4, "use_cpu": True,
        "gradient_accumulation_steps": 2, "eval_strategy": "epoch",
    }  # fmt: skip
    result = run(recipe_of(rows, llama, train=train))
    assert result.before == {"reward_accuracy": 0.5, "reward_margin": 0.0, "loss": pytest.approx(math.log(2))}
    assert result.after["reward_accuracy"] == 1.0
    assert result.after["reward_margin"] > 0.1
    assert result.after["loss"] < 0.6
    assert (result.samples[0].tuned, result.samples[0].base) == ("red", "green")
    during = [row for row in result.history if "eval_loss" in row]
    assert during[-1]["eval_loss"] == pytest.approx(result.after["loss"], rel=1e-3)
    assert during[-1]["eval_reward_accuracy"] == 1.0


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_a_reward_run_scores_the_better_answer_higher(
    base: str, rows: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = rows
    if base == "bert":
        made = [
            {"prompt": "anna in", "chosen": "paris", "rejected": "rome"},
            {"prompt": "bob", "chosen": "the par", "rejected": "the rome"},
        ]
        path = write_jsonl(tmp_path / "texts.jsonl", made * 3)
    train = {"learning_rate": 0.01, "num_train_epochs": 10, "per_device_train_batch_size": 4, "use_cpu": True}
    result = run(recipe_of(path, request.getfixturevalue(base), "reward", train=train, merge=True))
    assert result.after["reward_accuracy"] == 1.0
    assert result.after["loss"] < 0.3 < result.before["loss"]
    assert result.after["reward_margin"] > 0.5


def test_reward_losses(rows: Path, llama: Path) -> None:
    from veneer.train.tasks.reward import Reward, RewardOptions

    scores = torch.tensor([1.0, 0.5, -1.0, 2.0])
    task = Reward(RewardOptions(margin=0.5, center=0.1))
    want = [math.log(1 + math.exp(-(0.5 - 0.5))) + 0.1 * 1.5**2, math.log(1 + math.exp(3.5)) + 0.1]
    assert task._losses(scores).tolist() == pytest.approx(want)
    plan = plan_of(recipe_of(rows, llama, "reward"))
    assert plan.model_options == {"num_labels": 1}
    assert (task.items(task.collator(AutoTokenizer.from_pretrained(llama))(plan.train.to_list())) != IGNORE).sum() == 12


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is int"),
        ({"chosen": "b", "rejected": "c"}, "need a `prompt` column"),
        ({"prompt": "a", "chosen": [YES], "rejected": [USER]}, "ends with a turn of user"),
        ({"prompt": "a", "chosen": [], "rejected": [NO]}, "not a list of turns"),
    ],
)
def test_bad_pairs(row: Any, words: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as caught:
        plan_of(recipe_of(write_jsonl(tmp_path / "a.jsonl", [row]), llama))
    assert caught.value.line == 1


def test_an_answer_cut_off_whole_is_an_error(llama: Path, tmp_path: Path) -> None:
    made = [FORMS["text"], {"prompt": "one two " * 9, "chosen": "red", "rejected": "blue"}]
    path = write_jsonl(tmp_path / "a.jsonl", made)
    with pytest.raises(DataError, match="nothing of 'chosen' is left after cutting to 12 tokens") as caught:
        plan_of(recipe_of(path, llama, data={"train": str(path), "max_length": 12}))
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.6}, "below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "for the sigmoid loss"),
        ({"sft_weight": -1.0}, "must not be negative"),
    ],
)
def test_bad_options(options: Any, words: str, rows: Path, llama: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(rows, llama, options=options)
