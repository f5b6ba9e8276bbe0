"""Rows to tokens: by several processes, and kept from one run to the next."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_train import chat, plan_of, recipe_for, write_jsonl

from veneer.train import batched, token_cache
from veneer.train.errors import DataError
from veneer.train.tasks import TASKS, Plan, task_class

WORDS = ["one", "two", "three", "four"]


def words(number: int) -> str:
    return " ".join(WORDS[(number + place) % 4] for place in range(number % 5 + 1))


#: a row of each task
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal-lm": lambda n: chat(words(n), words(n + 1)),
    "masked-lm": lambda n: {"text": f"anna in paris {'the ' * (n % 3)}."},
    "seq-cls": lambda n: {"text": f"bob in {'the ' * (n % 3)} rome", "label": f"l{n % 2}"},
    "token-cls": lambda n: {"tokens": ["anna", "in", "paris"][: n % 3 + 1], "labels": ["B-x", "O", "O"][: n % 3 + 1]},
    "question-answering": lambda n: {"question": "in the ?", "context": "anna in paris .", "answers": "paris"},
    "seq2seq": lambda n: {"source": words(n), "target": words(n + 2)},
    "embedding": lambda n: {"anchor": f"anna {'in ' * (n % 3)}", "positive": "bob"},
    "reward": lambda n: {"prompt": words(n), "chosen": words(n + 1), "rejected": words(n + 2)},
    "dpo": lambda n: {"prompt": words(n), "chosen": words(n + 1), "rejected": words(n + 2)},
}
BASES = {"seq2seq": "t5", "causal-lm": "llama", "reward": "llama", "dpo": "llama"}


@pytest.fixture
def plans(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """The plan of a task's rows; batches are of 4 rows."""
    monkeypatch.setattr(batched.in_batches, "__defaults__", (1, 4))

    def make(task: str, **data: Any) -> Plan:
        path = tmp_path / f"{task}.jsonl"
        if not path.exists():
            write_jsonl(path, [ROWS[task](number) for number in range(11)])
        base = request.getfixturevalue(BASES.get(task, "bert"))
        options = {"stride": 4} if task == "question-answering" else {}
        both = {"train": str(path), "test": str(path), **data}
        return plan_of(recipe_for(task, path, base, data=both, options=options))

    return make


def test_there_are_rows_for_every_task() -> None:
    assert set(ROWS) == set(TASKS)
    assert all(task_class(task).name == task for task in ROWS)


@pytest.mark.parametrize("task", ROWS)
def test_workers_give_the_same_tokens(plans: Callable[..., Plan], task: str) -> None:
    alone, together = plans(task), plans(task, workers=2)
    assert alone.train.to_list() == together.train.to_list()
    assert alone.stop_ids == together.stop_ids
    assert alone.test is not None
    assert together.test is not None
    assert alone.test.to_list() == together.test.to_list()


def test_an_error_of_a_worker_has_its_line(plans: Callable[..., Plan], tmp_path: Path) -> None:
    rows = [ROWS["token-cls"](number) for number in range(7)]
    rows[6]["labels"] = ["B-z"]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"test\.jsonl:7: unknown label 'B-z'"):
        plans("token-cls", workers=2, test=str(path))


@pytest.mark.parametrize("task", ROWS)
def test_what_is_kept_is_what_was_made(plans: Callable[..., Plan], task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "WORTH", 0.0)
    made = plans(task)
    with monkeypatch.context() as patch:
        patch.setattr(task_class(task), "plan_train", None)  # would fail, were it called
        kept = plans(task)
    assert kept.train.to_list() == made.train.to_list()
    for name in ("label_names", "examples", "stop_ids", "model_options", "facts", "asking", "notes"):
        assert getattr(kept, name) == getattr(made, name), name


def test_what_tokens_come_from_makes_another_key(
    plans: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(token_cache, "WORTH", 0.0)
    root = tmp_path / "veneer-cache" / "tokens"
    plans("causal-lm")
    for data in (
        {"max_length": 40},
        {"filter": {"messages": {"missing": False}}, "limit": 3},
        {"split": 0.5, "test": None},
    ):
        before = set(root.iterdir())
        plans("causal-lm", **data)
        plans("causal-lm", **data)
        assert len(set(root.iterdir()) - before) == 1, data
    before = set(root.iterdir())
    plans("causal-lm", max_length=41, cache=False)
    assert set(root.iterdir()) == before


def test_old_and_unfinished_entries(
    plans: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "veneer-cache" / "tokens"
    plans("causal-lm")
    assert not root.exists()  # too little work to be worth keeping
    monkeypatch.setattr(token_cache, "WORTH", 0.0)
    plans("causal-lm")
    [first] = root.iterdir()
    (first / "plan.json").unlink()
    assert len(plans("causal-lm").train) == 11
    long_ago = time.time() - 40 * 86400
    os.utime(first, (long_ago, long_ago))
    plans("causal-lm", max_length=40)
    [second] = root.iterdir()
    assert second != first
    assert json.loads((second / "plan.json").read_text())["stop_ids"]
