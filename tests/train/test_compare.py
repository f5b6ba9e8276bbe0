"""Several runs side by side: what is read, what differs, the page, and the errors for folders that are no runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_zoo import EVIL, Page, make_result
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.train.compare import compare, render_comparison
from veneer.train.errors import DataError
from veneer.train.result import write_result
from veneer.train.runs import read_run, read_runs


def save_run(folder: Path, changes: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A run on disk; ``settings`` are recipe values by dotted key with `__` for the dot."""
    folder.mkdir(parents=True)
    result = make_result(folder, **(changes or {}))
    plain = result.recipe.model_dump(mode="json")
    for key, value in settings.items():
        section, _, name = key.partition("__")
        plain[section] = {**plain[section], name: value} if name else value
    result.recipe = type(result.recipe).model_validate(plain)
    write_result(result, folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 2048)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    better = {
        "after": {"exact_match": 0.95, "field_accuracy": 0.975, "loss": 0.1, "examples": 40},
        "train_seconds": 30.0,
    }
    return [
        save_run(tmp_path / "first"),
        save_run(tmp_path / "second", better, adapter__r=16, train__learning_rate=2e-3),
    ]


def command(*words: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_a_run_is_read_back(two: list[Path]) -> None:
    run = read_run(two[0])
    assert (run.name, run.task, run.base, run.method) == ("first", "causal-lm", "smollm2-135m-instruct", "lora")
    assert run.after == {"exact_match": 0.9, "field_accuracy": 0.975, "loss": 0.2, "examples": 40}
    assert [row["step"] for row in run.history] == list(range(1, 21))
    assert run.tokens_per_second == pytest.approx(2000.0)
    assert run.peak_memory_mb == 900.0
    assert run.adapter_bytes == 2048
    assert read_run(two[0] / "adapter").folder == two[0] == read_run(two[0] / "result.json").folder


def test_only_what_differs_is_a_setting(two: list[Path]) -> None:
    found = compare(read_runs(two))
    assert found.settings == {"adapter.r": [4, 16], "train.learning_rate": [1e-3, 2e-3]}
    assert found.setting_rows() == [("adapter.r", ["4", "16"]), ("train.learning_rate", ["0.001", "0.002"])]
    assert found.notes == []


def test_metrics_know_their_best(two: list[Path]) -> None:
    lines = {line.name: line for line in compare(read_runs(two)).metrics}
    assert list(lines) == ["exact match", "field accuracy", "loss"]
    assert lines["exact match"].best == {1}
    assert lines["loss"].best == {1}
    assert lines["field accuracy"].best == frozenset()  # both the same
    assert [lines["exact match"].text(v) for v in lines["exact match"].after] == ["90.0 %", "95.0 %"]
    assert lines["loss"].bars(0) == (1.0, pytest.approx(0.08))
    assert lines["exact match"].bars(1) == (0.0, 0.95)


def test_notes_say_what_cannot_be_compared(tmp_path: Path) -> None:
    other = {"task": "seq-cls", "after": {"accuracy": 0.5}, "before": {"accuracy": math.inf}, "history": [],
             "machine": {"name": "another", "threads": 8}}  # fmt: skip
    runs = read_runs(
        [save_run(tmp_path / "a"), save_run(tmp_path / "b", other, data__test="more.jsonl", adapter__r=None)]
    )
    found = compare(runs)
    notes = " ".join(found.notes)
    for text in ("different tasks", "data.test differ", "threads is None, 8", "No log.jsonl, so no curve: b."):
        assert text in notes, notes
    lines = {line.name: line for line in found.metrics}
    assert lines["accuracy"].after == [None, 0.5]
    assert lines["accuracy"].text(None) == "–"
    assert lines["accuracy"].bars(1) is None  # an infinite bar cannot be drawn
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["runs"][1]["before"] == {"accuracy": None}
    assert plain["runs"][1]["tokens_per_second"] == pytest.approx(2000.0)
    assert Page(render_comparison(found)).open == []


def test_names_tell_the_runs_apart(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / place / "out") for place in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out"]


def test_page_holds_curves_bars_and_answers(two: list[Path]) -> None:
    text = render_comparison(compare(read_runs(two)))
    page = Page(text)
    assert page.open == []
    assert text.count('class="plot"') == 1  # no held-out loss was logged
    assert text.count('<path class="line run0"') == text.count('<path class="line run1"') == 1
    assert text.count('class="track') == 6  # 3 metrics, 2 runs
    shown = " ".join("".join(page.text).split())
    for words in ("first, second", "adapter.r416", "90.0 %", "95.0 %", "460.8 k (0.34 %)", "0.88 GB", "30 s"):
        assert words in shown, words
    assert EVIL not in text
    assert "<script>alert" not in text
    assert EVIL in "".join(page.text)  # a prompt, as text
    assert not [item for item in page.attributes if item[1] in {"src", "href", "srcset", "data", "action"}]
    assert any("default-src 'none'" in value for tag, _, value in page.attributes if tag == "meta")


def test_more_runs_than_colours(tmp_path: Path) -> None:
    text = render_comparison(compare(read_runs([save_run(tmp_path / str(i)) for i in range(9)])))
    assert '<path class="line run0 broken"' in text
    assert "9 runs" in text


def test_command_prints_the_table_and_writes_the_page(two: list[Path], tmp_path: Path) -> None:
    done = command(*two, "--html", tmp_path / "deep" / "page.html")
    assert done.exit_code == 0, done.output
    for text in (
        "first",
        "second",
        "adapter.r",
        "0.0 % → 95.0 %",
        "1 min 15 s",
        "2,000",
        "900.0 MB",
        "2.0 KB",
        "page in",
    ):
        assert text in done.output, (text, done.output)
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_many_runs_take_several_tables(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / f"run{i}") for i in range(5)]
    done = command(*folders, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert done.output.count("trained parameters") > 1
    assert all(f"run{i}" in done.output for i in range(5))


def test_command_gives_json_and_no_page(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(command(*two, "--json").output)
    assert [run["name"] for run in found["runs"]] == ["first", "second"]
    assert found["settings_that_differ"]["adapter.r"] == [4, 16]
    assert found["runs"][1]["after"]["exact_match"] == 0.95
    assert not (tmp_path / "compare.html").exists()


def error(*words: object) -> str:
    done = command(*words)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def test_errors_say_what_to_do(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    assert "report.html is the page of this one" in error("first")
    assert "there is no such folder" in error("first", "frist")
    assert f"Did you mean {tmp_path / 'first'}?" in error("first", "frist")
    assert f"It holds runs: give {tmp_path / 'first'}" in error("first", ".")
    assert "the same run is given twice" in error("first", "./first")
    assert "It is an adapter without its run" in _adapter_alone(tmp_path)
    (tmp_path / ".third.partial").mkdir()
    assert "call `veneer train` again as before" in error("first", "third")
    assert not (tmp_path / "compare.html").exists()


def _adapter_alone(tmp_path: Path) -> str:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text("{}")
    return error("first", alone)


def test_damaged_files_are_named(two: list[Path]) -> None:
    log = two[1] / "log.jsonl"
    log.write_text(log.read_text() + "{half\n")
    with pytest.raises(DataError, match=r"log\.jsonl:21: this is not JSON"):
        read_runs(two)
    log.unlink()
    assert read_run(two[1]).history == []
    result = two[1] / "result.json"
    values = json.loads(result.read_text())
    del values["before"], values["machine"]
    result.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"result\.json: before, machine missing"):
        read_run(two[1])
    result.write_text("{")
    with pytest.raises(DataError, match=r"result\.json: this is not JSON"):
        read_run(two[1])
