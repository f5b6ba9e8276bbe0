"""Runs that cannot work: they say why, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from veneer.train import Recipe, RecipeError, run
from veneer.train.bases import safe_pad
from veneer.train.result import whole_folder

Flags = dict[str, Any]


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        raise KeyboardInterrupt


def test_a_failing_run_leaves_nothing(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        run(causal(), callbacks=[Stop()])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_failing_run_keeps_the_old_one(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    short = {"max_steps": 1, "use_cpu": True}
    first = run(causal(train=short, data__test=None))
    log = (Path(first.out) / "log.jsonl").read_text()
    with pytest.raises(RecipeError, match="already holds a run"):
        causal()
    with pytest.raises(KeyboardInterrupt):
        run(causal(overwrite=True), callbacks=[Stop()])
    assert (Path(first.out) / "log.jsonl").read_text() == log
    second = run(causal(overwrite=True, train={**short, "learning_rate": 0.5}, data__test=None))
    assert (Path(second.out) / "log.jsonl").read_text() != log
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_whole_folder_survives_a_failing_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    real = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target) == out and ".partial" in str(source):
            raise OSError("disk")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"), whole_folder(out) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "key", "words"),
    [
        ({"adapter": {"target_modules": ["q_prj"]}}, "adapter", "q_prj"),
        ({"adapter": {"r": 0}}, "adapter", "r"),
        ({"train": {"eval_strategy": "steps"}, "data": "TRAIN"}, "train.eval_strategy", "no test rows"),
        (
            {"train": {"eval_strategy": "epoch", "load_best_model_at_end": True}},
            "train.load_best_model_at_end",
            "strategy to match",
        ),
        (
            {"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 2}, "merge": True},
            "merge",
            "cannot be merged",
        ),
    ],
)
def test_late_errors_are_recipe_errors(
    causal: Callable[..., Recipe], chats: Path, tmp_path: Path, flags: Flags, key: str, words: str
) -> None:
    if flags.get("data") == "TRAIN":
        flags = {**flags, "data": {"train": str(chats)}}
    with pytest.raises(RecipeError) as caught:
        run(causal(**flags))
    assert str(caught.value.key).startswith(key)
    assert words in caught.value.problem
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_language_head_is_refused(causal: Callable[..., Recipe], bert: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no chat template|lacks weights"):
        run(causal(base=str(bert)))


def test_safe_pad() -> None:
    from tiny_train import bpe_tokenizer

    fine = bpe_tokenizer(pad_token="<|endoftext|>")
    assert safe_pad(fine, {2}) is None
    none = bpe_tokenizer()
    none.pad_token = None
    assert "names no pad token" in str(safe_pad(none, {2}))
    assert none.pad_token == "<|endoftext|>"
    taken = bpe_tokenizer(bos_token="<|endoftext|>")
    assert "no other token is free" in str(safe_pad(taken, {0, 2}))
    assert taken.pad_token == taken.eos_token


def test_hub_ids_offline(causal: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="Check the id, the revision and the connection"):
        run(causal(base="someone/some-model"))
