"""A loss of the recipe's own, early stopping, class weights and label smoothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import check_same, stop_and_go
from tiny_train import recipe_for, write_jsonl

from veneer.train import Recipe, RecipeError, run

LOSSES = """
from torch.nn.functional import cross_entropy

calls = []

def plain(outputs, labels, num_items_in_batch=None):
    calls.append(num_items_in_batch)
    scores, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(scores, wanted, reduction="sum") / num_items_in_batch

def doubled(outputs, labels, num_items_in_batch=None):
    return 2 * plain(outputs, labels, num_items_in_batch)

def classes(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels)

def narrow(outputs, labels):
    return outputs.logits.sum()

number = 3
"""
FEW = {
    "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
    "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True,
}  # fmt: skip
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of losses in the working directory."""
    name = f"losses_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(LOSSES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return name


def logged(recipe: Recipe, key: str) -> list[float]:
    return [row[key] for row in run(recipe).history if key in row]


@pytest.mark.parametrize("packing", ["none", "pack"])
def test_a_loss_written_out_trains_as_the_tasks_own(
    causal: Callable[..., Recipe], losses: str, tmp_path: Path, packing: str
) -> None:
    def train(name: str, **more: Any) -> Recipe:
        return causal(adapter=QV, out=str(tmp_path / name), train={**FEW, **more}, eval__generate=False, eval__limit=4,
                      options={"packing": packing}, data__max_length=128)  # fmt: skip

    own, given = (run(train("own")), run(train("given", loss=f"{losses}.plain")))
    for key in ("loss", "eval_loss"):
        found = [[row[key] for row in result.history if key in row] for result in (own, given)]
        assert found[1] == pytest.approx(found[0], rel=1e-4)
        assert found[0]
    counts = sys.modules[losses].calls
    assert min(counts) > 0
    twice = logged(train("twice", loss=f"{losses}.doubled", max_steps=1, eval_strategy="no"), "loss")
    assert twice[0] == pytest.approx(2 * own.history[0]["loss"], rel=1e-4)


def test_a_loss_for_classes(bert: Path, losses: str, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": ["anna", "bob"][n % 2], "label": "ab"[n % 2]} for n in range(8)]
    )
    train = {**FEW, "gradient_accumulation_steps": 1, "eval_strategy": "no"}
    own = logged(recipe_for("seq-cls", path, bert, train=train), "loss")
    given = logged(recipe_for("seq-cls", path, bert, train={**train, "loss": f"{losses}.classes"},
                              out=str(tmp_path / "given")), "loss")  # fmt: skip
    assert given == pytest.approx(own, rel=1e-4)


def test_the_loss_of_the_docs(causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    [program] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "def focal" in block]
    name = f"losses_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    train = {**FEW, "max_steps": 8, "loss": f"{name}.focal"}
    found = logged(causal(adapter=QV, train=train, eval__generate=False, eval__limit=4), "loss")
    assert 0 < found[-1] < found[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", "is not a dotted name"),
        ("{}.plian", "has no function 'plian'. Did you mean `plain`"),
        ("{}.number", "has no function 'number'"),
        ("{}_.plain", "No module named"),
        (
            "{}.narrow",
            r"cannot be called: .*num_items_in_batch.*def narrow\(outputs, labels, num_items_in_batch=None\)",
        ),
    ],
)
def test_losses_that_cannot_be_found(causal: Callable[..., Recipe], losses: str, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        causal(train={"loss": name.format(losses)})
    assert caught.value.key == "train.loss"


def test_what_does_not_go_together(causal: Callable[..., Recipe], bert: Path, losses: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="given beside `label_smoothing_factor`"):
        causal(train={"loss": f"{losses}.plain", "label_smoothing_factor": 0.1})
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"anchor": "anna", "positive": "bob"}])
    with pytest.raises(RecipeError, match="has no scores with labels"):
        recipe_for("embedding", pairs, bert, train={"loss": f"{losses}.plain"})
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "anna", "label": "a"}, {"text": "bob", "label": "b"}])
    balanced = {"class_weights": "balanced"}
    with pytest.raises(RecipeError, match=r"given beside `options\.class_weights`"):
        recipe_for("seq-cls", rows, bert, options=balanced, train={"label_smoothing_factor": 0.1})
    with pytest.raises(RecipeError, match="given beside `class_weights`"):
        recipe_for("seq-cls", rows, bert, options=balanced, train={"loss": f"{losses}.classes"})


@pytest.mark.parametrize("problem", [{"label": 0.5}, {"label": ["a", "b"]}])
def test_smoothing_is_for_one_label_a_row(bert: Path, tmp_path: Path, problem: dict[str, Any]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "anna", **problem}, {"text": "bob", **problem}])
    with pytest.raises(RecipeError, match="one label a row") as caught:
        run(recipe_for("seq-cls", rows, bert, train={"label_smoothing_factor": 0.1, "max_steps": 1, "use_cpu": True}))
    assert caught.value.key == "train.label_smoothing_factor"


STUCK = {**FEW, "max_steps": 30, "learning_rate": 0.0, "early_stopping_patience": 2}


def test_a_run_that_gets_no_better_ends(causal: Callable[..., Recipe]) -> None:
    result = run(causal(adapter=QV, train=STUCK, eval__generate=False, eval__limit=4))
    assert result.history[-1]["step"] == 6  # the first evaluation is the best; two more are no better
    better = {**STUCK, "learning_rate": 0.01, "max_steps": 10, "early_stopping_threshold": 1e-6}
    result = run(causal(adapter=QV, train=better, eval__generate=False, eval__limit=4, overwrite=True))
    assert result.history[-1]["step"] == 10


def test_any_score_can_be_watched(conll: Path, bert: Path) -> None:
    train = {**STUCK, "metric_for_best_model": "f1", "early_stopping_patience": 1, "per_device_train_batch_size": 1}
    result = run(recipe_for("token-cls", conll, bert, train=train))
    assert result.history[-1]["step"] == 4
    assert [row["eval_f1"] for row in result.history if "eval_f1" in row] == [result.after["f1"]] * 2


def test_the_best_checkpoint_is_kept(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    """Far too high a rate makes it worse than it was; the adapter is that of the best evaluation."""
    train = {**FEW, "max_steps": 12, "learning_rate": 3.0, "lr_scheduler_type": "constant", "warmup_steps": 0,
             "early_stopping_patience": 1, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2,
             "save_total_limit": 1, "max_grad_norm": 0.0, "optim": "sgd"}  # fmt: skip
    result = run(causal(adapter=QV, train=train, eval__generate=False, eval__limit=4))
    losses = [row["eval_loss"] for row in result.history if "eval_loss" in row]
    assert result.after["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_patience_lasts_over_a_break(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    def recipe(out: str) -> Recipe:
        train = {**STUCK, "save_strategy": "steps", "save_steps": 2}
        return causal(out=out, adapter=QV, train=train, eval__generate=False, eval__limit=4)

    check_same(*stop_and_go(recipe, tmp_path, [5]))


@pytest.mark.parametrize(
    ("train", "key"),
    [
        ({"early_stopping_patience": 2}, "train.early_stopping_patience"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "train.early_stopping_patience"),
        ({"early_stopping_patience": "two"}, "train.early_stopping_patience"),
        ({"early_stopping_threshold": 0.1}, "train.early_stopping_threshold"),
        ({"early_stoping_patience": 2}, "train.early_stoping_patience"),
    ],
)
def test_stopping_is_checked(causal: Callable[..., Recipe], train: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        causal(train=train)
    assert caught.value.key == key
