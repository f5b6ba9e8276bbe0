"""`seq-cls`: what becomes of labels of every kind, runs that learn them, and scores against known libraries."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_train import plan_of, recipe_for, write_jsonl
from transformers import AutoTokenizer

from veneer.train import DataError, RecipeError, run
from veneer.train.label_scores import class_scores, number_scores, set_scores
from veneer.train.tasks import get_task

PLACES = ["anna in paris", "bob in rome", "the par", "anna in rome .", "bob in paris .", "rome the bob"]
FAST = {"learning_rate": 0.02, "num_train_epochs": 20, "per_device_train_batch_size": 4, "use_cpu": True}


def rows_of(label: Any, pair: bool = False) -> list[dict[str, Any]]:
    second = {"text_pair": "in the"} if pair else {}
    return [{"text": text, **second, "label": label(text)} for text in PLACES]


recipe_of = partial(recipe_for, "seq-cls", train=FAST)


KINDS = {
    "text": (lambda text: "rome" if "rome" in text else "other", "single_label_classification", ["other", "rome"]),
    "int": (lambda text: 10 if "rome" in text else 9, "single_label_classification", ["9", "10"]),
    "bool": (lambda text: "rome" in text, "single_label_classification", ["false", "true"]),
    "list": (
        lambda text: [word for word in ("rome", "anna") if word in text],
        "multi_label_classification",
        ["anna", "rome"],
    ),
    "float": (lambda text: len(text) / 10, "regression", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_label_is_read_off_the_rows(kind: str, bert: Path, tmp_path: Path) -> None:
    label, problem_type, names = KINDS[kind]
    plan = plan_of(recipe_of(write_jsonl(tmp_path / "a.jsonl", rows_of(label)), bert))
    assert (plan.model_options["problem_type"], plan.label_names) == (problem_type, names)
    for row, text in zip(plan.train, PLACES, strict=True):
        want = label(text)
        if names is None:
            assert row["labels"] == want
        elif isinstance(want, list):
            assert row["labels"] == [float(name in want) for name in names]
        else:
            assert names[row["labels"]] == str(want).lower()


def test_two_sentences_get_their_types(bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(KINDS["text"][0], pair=True))
    row = plan_of(recipe_of(path, bert)).train[0]
    assert row["token_type_ids"] == [0] * 7 + [1] * 3  # [CLS] an na in par is [SEP], in the [SEP]
    assert len(row["input_ids"]) == row["length"] == 10
    other = [{"premise": "anna", "hypothesis": "bob", "labels": name} for name in ("yes", "no")]
    plan = plan_of(recipe_of(write_jsonl(tmp_path / "b.jsonl", other), bert))
    assert plan.examples[0] == ("anna | bob", "yes")


@pytest.mark.parametrize("kind", ["text", "list", "float"])
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_runs_learn_each_kind(kind: str, base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(KINDS[kind][0], pair=base == "bert"))
    steady = {"learning_rate": 0.01, "num_train_epochs": 40, "weight_decay": 0.0}
    result = run(recipe_of(path, folder, train={**FAST, **steady}))
    assert result.after["loss"] < 0.2 * result.before["loss"]
    best = {"text": "accuracy", "list": "exact_match", "float": "pearson"}[kind]
    assert result.after[best] > 0.95
    tensors = load_file(Path(result.adapter_dir) / "adapter_model.safetensors")
    assert any(("classifier" in name or "score" in name) and "lora" not in name for name in tensors)
    assert any("pooler" in name for name in tensors) == (base == "bert")  # a masked model has none of its own
    if kind == "text":
        assert {sample.tuned for sample in result.samples} == {"other", "rome"}


def test_labels_in_one_text(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nanna in rome,anna|rome\nbob,\nrome,rome\n".replace("bob,\n", "bob,bob\n"))
    plan = plan_of(recipe_of(path, bert, options={"separator": "|"}))
    assert plan.label_names == ["anna", "bob", "rome"]
    assert plan.train["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    numbers = tmp_path / "n.csv"
    numbers.write_text("text,score\nanna,1\nbob,2.5\n")
    plan = plan_of(recipe_of(numbers, bert, options={"problem_type": "regression"}))
    assert plan.train["labels"][:] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("rows", "options", "line", "words"),
    [
        ([{"text": "bob", "label": "a"}, {"text": "bob", "label": ["a"]}], {}, 2, "same kind of value in a column"),
        ([{"text": "bob", "label": "a"}, {"text": " ", "label": "b"}], {}, 2, "'text' is empty"),
        ([{"text": "bob", "label": "a"}, {"text": "bob", "label": ""}], {}, 2, "'label' is ''"),
        ([{"text": "bob", "label": "a"}, {"text": "bob", "label": None}], {}, 2, "'label' is null"),
        ([{"text": "bob", "label": "a"}, {"text": "bob", "label": "a"}], {}, None, "every training row has the label"),
        ([{"text": "bob", "label": "a"}], {"problem_type": "regression"}, 1, "is not a number"),
        ([{"text": "bob", "label": -100.0}], {}, 1, "cannot be learned"),
        ([{"text": "b", "label": ["a"]}], {"problem_type": "single_label_classification"}, 1, "several labels"),
    ],
)
def test_bad_rows(rows: Any, options: Any, line: int | None, words: str, bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=words) as caught:
        plan_of(recipe_of(path, bert, options=options))
    assert caught.value.line == line


def test_a_label_only_in_the_test_rows(bert: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows_of(KINDS["text"][0]))
    test = write_jsonl(tmp_path / "b.jsonl", [{"text": "bob", "label": "Rome"}])
    with pytest.raises(DataError, match=r"unknown label 'Rome'.*Did you mean `rome`"):
        plan_of(recipe_of(train, bert, data={"train": str(train), "test": str(test)}))


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"treshold": 0.4}, "options.treshold", "unknown key"),
        ({"threshold": 1.5}, "options.threshold", "between 0 and 1"),
        ({"problem_type": "regresion"}, "options.problem_type", "wrong type|not one of"),
        ({"separator": ",", "problem_type": "regression"}, "options", "parts several labels"),
        ({"class_weights": "balanced", "problem_type": "regression"}, "options.class_weights", "are for labels"),
    ],
)
def test_bad_options(options: Any, key: str, words: str, bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(KINDS["text"][0]))
    with pytest.raises(RecipeError, match=words) as caught:
        recipe_of(path, bert, options=options)
    assert str(caught.value.key).startswith(key)


def test_columns_are_named_by_role(bert: Path, tmp_path: Path) -> None:
    rows = [{"body": text, "stars": i % 2} for i, text in enumerate(PLACES)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    plan = plan_of(recipe_of(path, bert, data={"train": str(path), "columns": {"text": "body", "label": "stars"}}))
    assert plan.label_names == ["0", "1"]
    with pytest.raises(RecipeError, match="'lable' is not read") as caught:
        recipe_of(path, bert, data={"train": str(path), "columns": {"lable": "stars"}})
    assert (caught.value.key, caught.value.near) == ("data.columns.lable", "label")
    with pytest.raises(RecipeError, match="no column 'star'") as caught:
        recipe_of(path, bert, data={"train": str(path), "columns": {"text": "body", "label": "star"}})
    assert caught.value.near == "stars"


def test_class_weights(bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(lambda text: "par" if text == "the par" else "other"))
    plan = plan_of(recipe_of(path, bert, options={"class_weights": "balanced"}))
    assert plan.train["weight"][:] == pytest.approx([0.6, 0.6, 3.0, 0.6, 0.6, 0.6])
    plan = plan_of(recipe_of(path, bert, options={"class_weights": {"par": 4.0}}))
    assert plan.train["weight"][:] == [1.0, 1.0, 4.0, 1.0, 1.0, 1.0]
    with pytest.raises(RecipeError, match="no row has the label 'pra'"):
        plan_of(recipe_of(path, bert, options={"class_weights": {"pra": 4.0}}))


def test_class_weights_of_several_labels_are_torchs_pos_weight(bert: Path, tmp_path: Path) -> None:
    labels = [["a"], ["a", "b"], ["a"], [], ["c"], ["a", "c"]]
    rows = [{"text": text, "label": label} for text, label in zip(PLACES, labels, strict=True)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = recipe_of(path, bert, options={"class_weights": "balanced"})
    plan, task = plan_of(recipe), get_task("seq-cls")
    weights = torch.tensor([2 / 4, 5 / 1, 4 / 2])
    assert plan.label_names == ["a", "b", "c"]
    logits, wanted = torch.randn(6, 3), torch.tensor(plan.train["labels"][:])
    batch = {"labels": wanted, "weight": torch.tensor(plan.train["weight"][:])}
    model: Any = lambda **_: SimpleNamespace(logits=logits)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights)
    torch.testing.assert_close(task.loss(model, batch, None), expected)
    numbers = write_jsonl(tmp_path / "n.jsonl", rows_of(lambda text: 0.5))
    with pytest.raises(RecipeError, match="labels are numbers to learn"):
        plan_of(recipe_of(numbers, bert, options={"class_weights": "balanced"}))


def test_the_loss_is_the_models_own(bert: Path, tmp_path: Path) -> None:
    """Each kind's loss equals that of transformers, whole and as two halves of a step."""
    from transformers import AutoModelForSequenceClassification

    for kind, (label, problem_type, names) in KINDS.items():
        plan = plan_of(recipe_of(write_jsonl(tmp_path / f"{kind}.jsonl", rows_of(label)), bert))
        options = {"num_labels": len(names or "x"), "problem_type": problem_type}
        model = AutoModelForSequenceClassification.from_pretrained(bert, **options).eval()
        task, collate = get_task("seq-cls"), get_task("seq-cls").collator(AutoTokenizer.from_pretrained(bert))
        batch = collate(plan.train.to_list())
        own = model(**batch).loss
        torch.testing.assert_close(task.loss(model, batch, None), own)
        halves = [collate(plan.train.to_list()[:2]), collate(plan.train.to_list()[2:])]
        items = torch.tensor(sum(int((task.items(half) != -100).sum()) for half in halves))
        torch.testing.assert_close(sum(task.loss(model, half, items) for half in halves), own)


def test_scores_equal_those_of_the_known_libraries() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn import metrics

    random = np.random.default_rng(0)
    for classes in (2, 5):
        want, got = random.integers(0, classes, (2, 40))
        scores = class_scores(want, got, classes + 1)  # one class never occurs
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(want, got))
        assert scores["f1"] == pytest.approx(metrics.f1_score(want, got, average="macro"))
        assert scores["matthews_correlation"] == pytest.approx(metrics.matthews_corrcoef(want, got))
    many, found = random.integers(0, 2, (2, 30, 4))
    sets = set_scores(many, found)
    assert sets["f1"] == pytest.approx(metrics.f1_score(many, found, average="micro"))
    assert sets["f1_macro"] == pytest.approx(metrics.f1_score(many, found, average="macro"))
    assert sets["exact_match"] == pytest.approx(metrics.accuracy_score(many, found))
    left, right = np.round(random.normal(size=(2, 50)), 1)  # ties
    numbers = number_scores(left, right)
    assert numbers["pearson"] == pytest.approx(pearsonr(left, right).statistic)
    assert numbers["spearman"] == pytest.approx(spearmanr(left, right).statistic)
    assert numbers["mean_squared_error"] == pytest.approx(metrics.mean_squared_error(left, right))
    assert number_scores([1.0, 1.0], [2.0, 3.0])["pearson"] == 0.0
    assert class_scores([1, 1], [1, 1], 2)["matthews_correlation"] == 0.0


def test_task_scores_join_the_evaluation_in_training(bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(KINDS["text"][0]))
    train = {**FAST, "num_train_epochs": 3, "eval_strategy": "epoch"}
    result = run(recipe_of(path, bert, train=train))
    seen = [row for row in result.history if "eval_loss" in row]
    assert len(seen) == 3
    assert all({"eval_accuracy", "eval_f1", "eval_matthews_correlation"} <= row.keys() for row in seen)
    assert seen[-1]["eval_accuracy"] == result.after["accuracy"]
    assert seen[-1]["eval_loss"] == pytest.approx(result.after["loss"], rel=1e-4)
    assert json.loads((Path(result.adapter_dir) / "labels.json").read_text()) == ["other", "rome"]
