"""`question-answering`: windows over long contexts, answers put together again, SQuAD's scores, and runs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import plan_of, recipe_for, write_jsonl
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from veneer.train import DataError, RecipeError, run
from veneer.train.qa_spans import Window, answer_list, best_span, span_scores, windows_of
from veneer.train.tasks import task_of

CONTEXTS = ["anna in paris . bob in rome .", "bob in paris . anna in rome .", "the bob . anna in paris ."]
ROWS = [
    {"question": "anna", "context": context, "answers": {"text": [place], "answer_start": [context.index(place)]}}
    for context, place in zip(CONTEXTS, ("paris", "rome", "paris"))
]
NONE: dict[str, Any] = {"question": "anna", "context": "the bob in rome", "answers": {"text": [], "answer_start": []}}


recipe_of = partial(recipe_for, "question-answering", options={"stride": 2})


def test_every_window_marks_its_answer_or_none(bert: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, NONE])
    for length in (10, 12, 30):
        plan = plan_of(recipe_of(path, bert, data={"train": str(path), "test": str(path), "max_length": length}))
        windows = plan.targets[0]
        assert len(windows) == len(plan.test) >= 4
        marked = set()
        for row, window in zip(plan.test, windows, strict=True):
            assert row["length"] <= length
            text = tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
            if row["start_positions"] == 0:
                assert text == "[CLS]"
                continue
            expected = plan.targets[2][window.row]
            assert text.replace(" ##", "") == expected[0]
            marked.add(window.row)
        assert marked == {0, 1, 2}
        assert plan.facts == {"unanswerable": True}
        covered = [{c for w in windows if w.row == row for o in w.offsets if o for c in range(*o)} for row in range(4)]
        contexts = [*CONTEXTS, NONE["context"]]
        assert all(ch == " " or i in own for c, own in zip(contexts, covered) for i, ch in enumerate(c))


def test_the_loss_is_the_models_own(bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, NONE])
    recipe = recipe_of(path, bert)
    task, rows = task_of(recipe), plan_of(recipe).train.to_list()
    model: Any = AutoModelForQuestionAnswering.from_pretrained(bert).eval()
    collate = task.collator(AutoTokenizer.from_pretrained(bert))
    same = [row for row in rows if row["length"] == rows[0]["length"]]  # transformers counts padding as places
    batch = collate(same)
    own = model(**batch).loss
    torch.testing.assert_close(task.loss(model, batch, None), own)
    items = torch.tensor(len(same))
    halves = [task.loss(model, collate(part), items) for part in (same[:1], same[1:])]
    torch.testing.assert_close(sum(halves), own)


def test_runs_learn_to_answer(bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, NONE])
    train = {
        "learning_rate": 0.01, "num_train_epochs": 60, "per_device_train_batch_size": 8, "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 60,
    }  # fmt: skip
    data = {"train": str(path), "test": str(path), "max_length": 12}
    result = run(recipe_of(path, bert, train=train, data=data))
    assert result.after["exact_match"] == result.after["f1"] == 1.0 > result.before["exact_match"]
    assert [sample.tuned for sample in result.samples] == ["paris", "rome", "paris", ""]
    during = [row for row in result.history if "eval_loss" in row]
    assert during
    assert {"eval_exact_match", "eval_f1"} <= during[0].keys()


def window(offsets: list[tuple[int, int] | None]) -> Window:
    return Window(0, [0] * len(offsets), None, offsets, 0)


def test_the_best_span_of_all_windows() -> None:
    context = "aa bb cc dd"
    first, second = window([None, (0, 2), (3, 5)]), window([None, (6, 8), (9, 11)])
    starts, ends = [[0.0, 1.0, 9.0], [0.0, 3.0, 0.0]], [[0.0, 2.0, 0.0], [0.0, 1.0, 5.0]]
    plain: Any = {"n_best": 5, "longest": 5, "null_threshold": None}
    # the window's highest start has only lower ends before it, so the pair must be valid to count
    assert best_span([first, second], starts, ends, context, **plain).text == "bb"
    assert best_span([second], starts[1:], ends[1:], context, **plain).text == "cc dd"
    assert best_span([second], starts[1:], ends[1:], context, **{**plain, "longest": 1}).text == "dd"
    sure = best_span([second], [[9.0, 3.0, 0.0]], ends[1:], context, **{**plain, "null_threshold": 0.0})
    assert (sure.text, sure.start, sure.end) == ("", 0, 0)
    kept = best_span([second], [[9.0, 3.0, 0.0]], ends[1:], context, **{**plain, "null_threshold": 2.0})
    assert (kept.text, kept.start, kept.end, kept.score) == ("cc dd", 6, 11, 8.0)


def test_windows_overlap_by_the_stride(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    windows = windows_of(tokenizer, ["bob"], ["anna in paris the rome . " * 3], 12, 3)
    ids = [window.input_ids[4:-1] for window in windows]  # [CLS] bo ##b [SEP]
    assert all(left[-3:] == right[:3] for left, right in pairwise(ids))
    assert [window.row for window in windows] == [0] * len(windows)


def test_squad_scores() -> None:
    scores, right = span_scores([["The cat!", "dog"], ["a b c"], []], ["cat", "b c d", ""])
    assert right == [True, False, True]
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx((1 + 0.8 + 1) / 3)  # the article a is dropped: b c against b c d
    assert span_scores([[]], ["x"])[0] == {"exact_match": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    "value",
    [
        {"text": ["rome"], "answer_start": [8]},
        {"text": "rome", "answer_start": 8},
        [{"text": "rome", "answer_start": 8}],
        [{"text": "rome", "start": 8}],
        "rome",
    ],
)
def test_forms_of_answers(value: Any) -> None:
    assert answer_list(value, "anna in rome") == [("rome", 8)]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"text": ["rome"], "answer_start": [7]}, "not at character 7 .*it is at 8"),
        ({"text": ["oslo"], "answer_start": [0]}, "the context does not hold it"),
        ("oslo", "is not in the context"),
        ([1], "expected `text` and `answer_start`"),
        ([{"text": "rome"}], "needs a `text` and an `answer_start`"),
    ],
)
def test_answers_that_are_not_there(answers: Any, words: str, bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "bob", "context": "anna in rome", "answers": answers}])
    with pytest.raises(DataError, match=words) as caught:
        plan_of(recipe_of(path, bert))
    assert caught.value.line == 1


def test_a_question_too_long_for_its_window(bert: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[0], "question": "anna " * 4}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="a question of 8 tokens leaves 1 of 12 tokens") as caught:
        plan_of(recipe_of(path, bert, data={"train": str(path), "max_length": 12}))
    assert caught.value.line == 2


def test_smoothing_is_refused(bert: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(RecipeError, match="does not fit the task") as caught:
        recipe_of(path, bert, train={"label_smoothing_factor": 0.1})
    assert caught.value.key == "train.label_smoothing_factor"
