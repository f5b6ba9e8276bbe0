"""`base.matmul: int8` in a run: it learns as well, says what it does, and steps aside where it gains nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from veneer import int8
from veneer.train import Recipe, run


def test_a_run_in_int8_learns_and_leaves_the_model_in_floats(
    causal: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "int8_is_faster", lambda: True)
    used = [0]
    real = int8.Int8Weight.product

    def product(*args: object) -> None:
        used[0] += 1
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(int8.Int8Weight, "product", product)
    result = run(causal(base__matmul="int8", train__num_train_epochs=30))
    assert used[0] > 1000
    assert result.after["exact_match"] == 1.0
    assert not int8._active


def test_a_machine_that_gains_nothing_keeps_its_floats(
    causal: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(int8, "int8_is_faster", lambda: False)
    result = run(causal(base__matmul="int8", train__num_train_epochs=1, out=str(tmp_path / "left")))
    assert any("`base.matmul: int8` is left out" in note for note in result.notes)
    floats = run(causal(train__num_train_epochs=1, out=str(tmp_path / "floats")))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in floats.history]
