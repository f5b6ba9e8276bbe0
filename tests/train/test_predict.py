"""`veneer eval` and `veneer predict` on trained folders of every task: the same scores and answers as in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_train import chat, write_jsonl
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.train import load_recipe, run
from veneer.train.entities import spans, tag_words, words_of
from veneer.train.purpose import read_purpose
from veneer.train.use import load

PLACES = ["anna in paris", "bob in rome", "the par", "anna in rome .", "bob in paris .", "rome the bob"]
USER = {"role": "user", "content": "colour"}


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


#: task -> (base, options, labelled rows, more recipe values)
TASKS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "causal-lm": ("llama", {}, [chat(f"colour {i}", ("red", "green", "blue")[i % 3]) for i in range(6)]),
    "dpo": ("llama", {}, [{"prompt": [USER], "chosen": [_turn("red")], "rejected": [_turn("blue")]}] * 4),
    "masked-lm": ("bert", {"join": False, "mlm_probability": 0.4}, [{"text": text} for text in PLACES]),
    "seq2seq": ("t5", {"source_prefix": "two "}, [{"source": "one", "target": "red"}, {"source": "x", "target": "y"}]),
    "seq-cls": ("bert", {}, [{"body": text, "label": "rome" if "rome" in text else "other"} for text in PLACES]),
    "token-cls": ("bert", {}, [{"tokens": ["anna", "in", "rome"], "labels": ["B-per", "O", "B-loc"]}] * 4),
    "question-answering": (
        "bert",
        {"stride": 2},
        [{"question": "anna", "context": text, "answers": {"text": ["in"], "answer_start": [text.index("in")]}}
         for text in PLACES[:2]],
    ),
    "embedding": ("bert", {"pooling": "cls"}, [{"anchor": text, "positive": text[::-1]} for text in PLACES]),
    "reward": ("llama", {}, [{"prompt": "colour ", "chosen": "red", "rejected": "blue"}] * 4),
}  # fmt: skip

made: dict[str, Any] = {}


@pytest.fixture
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a short run of the task asked for, and its data file; each made once."""
    name = request.param
    if name not in made:
        base, options, rows = TASKS[name]
        folder = tmp_path_factory.mktemp(name)
        path = write_jsonl(folder / "rows.jsonl", rows)
        data = {"train": str(path), "test": str(path)} | ({"columns": {"text": "body"}} if name == "seq-cls" else {})
        recipe = load_recipe(
            None, task=name, base=str(request.getfixturevalue(base)), options=options, data=data, merge=True,
            adapter={"r": 4, "target_modules": "all-linear"}, eval={"max_new_tokens": 4}, out=str(folder / "out"),
            train={"max_steps": 3, "learning_rate": 0.01, "use_cpu": True},
        )  # fmt: skip
        made[name] = (run(recipe), path)
    return made[name]


def invoke(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("trained", TASKS, indirect=True)
def test_eval_gives_the_scores_of_the_run(trained: Any, tmp_path: Path) -> None:
    result, path = trained
    out = tmp_path / "scores.json"
    printed = invoke("eval", result.adapter_dir, "--data", path, "--compare", "--out", out)
    found = json.loads(out.read_text())
    assert found["scores"] == pytest.approx(result.after, rel=1e-4, abs=1e-6)
    # a head that the base lacks is random before training, and anew each time
    if result.task not in ("seq-cls", "token-cls", "question-answering", "reward"):
        assert found["base_scores"] == pytest.approx(result.before, rel=1e-4, abs=1e-6)
    assert (found["task"], found["rows"]) == (result.task, len(path.read_text().splitlines()))
    assert "Held-out scores" in printed
    if result.task != "dpo":  # whose score is against the base
        invoke("eval", result.merged_dir, "--data", path, "--out", out)
        merged = json.loads(out.read_text())["scores"]
        assert merged == pytest.approx(result.after, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("trained", TASKS, indirect=True)
def test_predict_answers_every_row_in_order(trained: Any, tmp_path: Path) -> None:
    result, path = trained
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if result.task == "masked-lm":
        rows = [{"text": row["text"].replace("in", "[MASK]") + " [MASK]"} for row in rows]
    many = write_jsonl(tmp_path / "in.jsonl", rows * 7)
    out = tmp_path / "sub" / "out.jsonl"
    invoke("predict", result.adapter_dir, "--file", many, "--out", out, "--batch-size", 2, "--max-new-tokens", 4)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: value for key, value in row.items() if key != "prediction"} for row in found] == rows * 7
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    first = [row["prediction"] for row in found[: len(rows)]]
    for again in range(7):  # batches of other lengths give the same
        part = [row["prediction"] for row in found[again * len(rows) : (again + 1) * len(rows)]]
        assert all(close(a, b) for a, b in zip(first, part, strict=True))
    check(result, rows, first)


def close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) if isinstance(a, float) else a == b


def check(result: Any, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """The answers are those that the run itself gave to the same rows."""
    samples = result.samples[: len(rows)]
    if result.task == "seq-cls":
        assert [answer["label"] for answer in found] == [sample.tuned for sample in samples]
        assert all(sum(answer["scores"].values()) == pytest.approx(1) for answer in found)
        assert all(answer["score"] == max(answer["scores"].values()) for answer in found)
    elif result.task == "token-cls":
        shown = ["; ".join(f"{e['label']}: {e['text']}" for e in a["entities"]) or "-" for a in found]
        assert shown == [sample.tuned for sample in samples]
        assert all(len(answer["labels"]) == 3 for answer in found)
    elif result.task == "question-answering":
        assert [answer["answer"] for answer in found] == [sample.tuned for sample in samples]
        assert all(row["context"][a["start"] : a["end"]] == a["answer"] for row, a in zip(rows, found))
    elif result.task in ("seq2seq", "causal-lm"):
        assert [answer["text"] for answer in found] == [sample.tuned for sample in samples]
    elif result.task == "embedding":
        assert all(len(a["embedding"]) == 32 and math.hypot(*a["embedding"]) == pytest.approx(1) for a in found)
    elif result.task == "masked-lm":
        assert all(len(a["fills"]) == row["text"].count("[MASK]") for a, row in zip(found, rows))
        assert all("[MASK]" not in answer["text"] for answer in found)
        assert all(fill == sorted(fill, key=lambda f: -f["score"]) for a in found for fill in a["fills"])
    elif result.task == "reward":
        assert len({round(answer["score"], 4) for answer in found}) == 1
    else:
        assert all(set(answer) == {"text"} for answer in found)


@pytest.mark.parametrize("trained", ["seq-cls", "embedding", "seq2seq", "token-cls"], indirect=True)
def test_predict_takes_texts(trained: Any) -> None:
    result, _ = trained
    lines = invoke("predict", result.adapter_dir, "-t", "anna in rome", "-t", "bob").splitlines()
    assert len(lines) == 2
    assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize("trained", ["token-cls"], indirect=True)
def test_entities_of_a_text_are_characters(trained: Any) -> None:
    result, _ = trained
    text = "anna in  rome ."
    answer = json.loads(invoke("predict", result.adapter_dir, "-t", text))
    assert all(text[e["start"] : e["end"]] == e["text"] for e in answer["entities"])
    assert all(0 < e["score"] <= 1 for e in answer["entities"])


@pytest.mark.parametrize("trained", ["token-cls"], indirect=True)
def test_no_word_of_a_long_text_is_left_out(trained: Any) -> None:
    """Windows tag a long text as short texts are tagged where the model sees the same neighbourhood."""
    loaded = load(trained[0].adapter_dir)
    words = ["anna", "in", "rome", "."] * 40
    tagged = tag_words(loaded.model, loaded.tokenizer, [words, [], ["bob"]], 16, 4)
    assert [len(row) for row in tagged] == [160, 0, 1]
    assert tagged[2][0] == tag_words(loaded.model, loaded.tokenizer, [["bob"]], 64, 1)[0][0]
    assert all(score < 1 for _, score in tagged[0])  # 1 would be a word that no window labelled


def test_spans_of_iobes() -> None:
    assert spans(["B-a", "E-a", "S-a", "S-a", "O", "E-a"]) == [(0, 2, "a"), (2, 3, "a"), (3, 4, "a"), (5, 6, "a")]
    assert words_of("don't, x") == [(0, 3), (3, 4), (4, 5), (5, 6), (7, 8)]


@pytest.mark.parametrize("trained", ["question-answering"], indirect=True)
def test_what_cannot_be_predicted_is_said(trained: Any, tmp_path: Path) -> None:
    result, _ = trained
    refused = CliRunner().invoke(app, ["predict", result.adapter_dir, "-t", "x"])
    assert (refused.exit_code, "reads question and context" in refused.output) == (2, True)
    rows = [{"question": "anna", "context": "anna in rome"}, {"question": "anna", "context": " "}]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    refused = CliRunner().invoke(app, ["predict", result.adapter_dir, "-f", str(path), "-o", str(tmp_path / "o.jsonl")])
    assert refused.exit_code == 2
    assert "'context' is empty" in refused.output
    assert "in.jsonl:2" in refused.output.replace("\n", "").replace("│", "").replace(" ", "")
    assert [item.name for item in tmp_path.glob("o.jsonl*")] == []
    refused = CliRunner().invoke(app, ["predict", result.adapter_dir])
    assert (refused.exit_code, "nothing to answer" in refused.output) == (2, True)


@pytest.mark.parametrize("trained", ["seq-cls"], indirect=True)
def test_a_text_that_is_cut_is_marked(trained: Any, tmp_path: Path) -> None:
    result, _ = trained
    path = write_jsonl(tmp_path / "in.jsonl", [{"body": "bob " * 80}, {"body": "bob"}])
    lines = invoke("predict", result.adapter_dir, "-f", path).splitlines()
    assert ["cut" in json.loads(line)["prediction"] for line in lines] == [True, False]


@pytest.mark.parametrize("trained", ["seq-cls"], indirect=True)
def test_a_head_that_is_missing_is_refused(trained: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(trained[0].adapter_dir, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = ["classifier"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused = CliRunner().invoke(app, ["predict", str(folder), "-t", "x"])
    assert (refused.exit_code, "brings no pooler" in refused.output) == (2, True)


@pytest.mark.parametrize("trained", ["seq-cls", "question-answering"], indirect=True)
def test_the_purpose_is_kept(trained: Any, tmp_path: Path) -> None:
    result, _ = trained
    purpose = read_purpose(Path(result.adapter_dir))
    assert purpose is not None
    assert purpose.task == result.task
    if result.task == "seq-cls":
        assert purpose.data["columns"] == {"text": "body"}
        assert purpose.model_options == {"problem_type": "single_label_classification"}
    else:
        assert (purpose.options, purpose.facts) == ({"stride": 2}, {"unanswerable": False})
    (tmp_path / "task.json").write_text('{"task": "x"}')
    refused = pytest.raises(ValueError, match=r"not what an adapter's task\.json holds")
    with refused:
        read_purpose(tmp_path)
