"""The answers that evaluation gets during training, in the log and in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from report_zoo import EVIL, Page, make_result

from veneer.train import Recipe, run
from veneer.train.report import render_report


def test_answers_join_the_log(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    train = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.02, "use_cpu": True}
    result = run(causal(train=train, eval={"samples": 3, "limit": 6, "max_new_tokens": 6}))
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    sampled = [line for line in lines if "samples" in line]
    assert [line["step"] for line in sampled] == [2, 4]
    assert [(s["prompt"], s["expected"]) for s in sampled[0]["samples"]] == [
        (s.prompt, s.expected) for s in result.samples
    ]
    assert [(s["answer"], s["ok"]) for s in sampled[1]["samples"]] == [(s.tuned, s.tuned_ok) for s in result.samples]
    page = render_report(result)
    assert "Answers during training" in page
    assert "step 2" in page
    assert Page(page).open == []


def test_no_evaluation_no_answers(causal: Callable[..., Recipe]) -> None:
    train = {"max_steps": 1, "use_cpu": True}
    result = run(causal(train=train, eval={"limit": 2, "max_new_tokens": 2}))
    assert not any("samples" in line for line in result.history)
    assert "Answers during training" not in render_report(result)


def test_none_are_kept_where_none_are_asked_for(causal: Callable[..., Recipe]) -> None:
    train = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "use_cpu": True}
    result = run(causal(train=train, eval={"samples": 0, "limit": 2, "max_new_tokens": 2}))
    assert [row.keys() & {"samples", "eval_loss"} for row in result.history if "loss" not in row] == [{"eval_loss"}]


def test_the_report_takes_answers_for_what_they_are(tmp_path: Path) -> None:
    sample = {"prompt": EVIL, "expected": '{"a": 1}', "answer": '{"a": "<b>"}', "ok": False}
    text = render_report(make_result(tmp_path, history=[{"step": 7, "samples": [sample]}]))
    page = Page(text)
    assert page.open == []
    assert EVIL not in text
    assert "step 7" in text
    assert "<b>" not in text
