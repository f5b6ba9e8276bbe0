"""Files as people have them: other separators, labels as numbers with names, splits by name, forms of other tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_train import chat, plan_of, recipe_for, write_jsonl

from veneer.train import DataError
from veneer.train.data import Table, load_tables

TEXTS = ["anna in rome", "bob in paris", "the par"]


def tables(task: str, data: Path | dict[str, Any], base: Path, **more: Any) -> tuple[Table, Table | None]:
    given = data if isinstance(data, dict) else {"train": str(data)}
    recipe = recipe_for(task, base, base, data=given, out=str(base.parent / "unused"), **more)
    return load_tables(recipe.data, recipe.task, recipe.seed)


@pytest.mark.parametrize(
    "text", ["text;label\na, b;pos\n", "text\tlabel\na, b\tpos\n", '\ufefftext, label\n"a, b", pos\n']
)
def test_other_separators_and_spaces_in_the_header(text: str, bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    rows = tables("seq-cls", path, bert)[0].dataset.to_list()
    assert [(row["text"], row["label"].strip()) for row in rows] == [("a, b", "pos")]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_say_what_to_do(encoding: str, bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncafé,pos\n".encode(encoding))
    with pytest.raises(DataError, match=r"is not UTF-8 text.*iconv"):
        tables("seq-cls", path, bert)


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_labels_with_names_keep_them(form: str, bert: Path, tmp_path: Path) -> None:
    """A label, and a list of them; a test set's -1 is no label."""
    named = datasets.ClassLabel(names=["neg", "pos"])
    one = datasets.Features({"text": datasets.Value("string"), "label": named})
    several = datasets.Features({"tokens": [datasets.Value("string")], "labels": [named]})
    whole = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1]}, features=one)
    words = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "labels": [[1, 0]]}, features=several)
    unknown = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, -1, 1]}, features=one)
    paths = []
    for name, rows in (("whole", whole), ("words", words), ("unknown", unknown)):
        paths.append(tmp_path / (f"{name}.parquet" if form == "parquet" else name))
        _ = rows.to_parquet(paths[-1]) if form == "parquet" else rows.save_to_disk(paths[-1])
    assert tables("seq-cls", paths[0], bert)[0].dataset["label"][:] == ["pos", "neg", "pos"]
    assert tables("token-cls", paths[1], bert)[0].dataset["labels"][:] == [["pos", "neg"]]
    with pytest.raises(DataError, match="row 2: 'label' is null"):
        tables("seq-cls", paths[2], bert)


def test_a_folder_with_splits_does_not_leak(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    folder = tmp_path / "set"
    folder.mkdir()
    for name, row in zip(("train-0.jsonl", "test.jsonl", "extra.jsonl"), rows, strict=True):
        write_jsonl(folder / name, [row])
    train, test = tables("seq-cls", {"train": str(folder), "test": str(folder)}, bert)
    assert test is not None
    assert sorted(train.dataset["text"]) == ["anna in rome", "the par"]
    assert test.dataset["text"][:] == ["bob in paris"]
    assert train.notes == ("set: test.jsonl not read as train rows, by the names of the files.",)
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows[:2]), validation=datasets.Dataset.from_list(rows[2:])
    ).save_to_disk(saved)
    train, test = tables("seq-cls", {"train": str(saved), "test": str(saved)}, bert)
    assert test is not None
    assert (len(train), test.dataset["text"][:]) == (2, ["the par"])


def test_chats_of_another_form(llama: Path, tmp_path: Path) -> None:
    theirs = {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "red"}]}
    first, second = write_jsonl(tmp_path / "a.jsonl", [theirs]), write_jsonl(tmp_path / "b.jsonl", [chat("one", "red")])
    assert (
        plan_of(recipe_for("causal-lm", first, llama)).train[0]
        == plan_of(recipe_for("causal-lm", second, llama)).train[0]
    )


def test_squads_own_file(bert: Path, tmp_path: Path) -> None:
    answer = {"text": "rome", "answer_start": 8}
    asked = [{"question": "bob", "answers": [answer]}, {"question": "anna", "is_impossible": True, "answers": []}]
    article = {"title": "x", "paragraphs": [{"context": "anna in rome", "qas": asked}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}))
    rows = tables("question-answering", path, bert)[0].dataset.to_list()
    assert [(row["question"], row["answers"]["text"]) for row in rows] == [("bob", ["rome"]), ("anna", [])]
    assert rows[0]["answers"]["answer_start"] == [8]


def labelled(tmp_path: Path, bert: Path, labels: list[Any], **more: Any) -> Any:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    return plan_of(recipe_for("seq-cls", write_jsonl(tmp_path / "a.jsonl", rows), bert, **more))


def test_labels_that_are_easily_mistaken(bert: Path, tmp_path: Path) -> None:
    scored = labelled(tmp_path, bert, ["0.5", "1", "2.25"])  # a CSV file's numbers
    assert scored.train["labels"][:] == [0.5, 1.0, 2.25]
    assert "The labels are decimal numbers, learned as such; see `options.problem_type`." in scored.notes
    assert labelled(tmp_path, bert, ["1", "2", "1"]).label_names == ["1", "2"]
    assert labelled(tmp_path, bert, ["v1.0", "2.0", "3.0"]).label_names is not None
    with pytest.raises(DataError, match=r"'label' is \[1, 0, 1\]: list the labels that a row has"):
        labelled(tmp_path, bert, [[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    parted = labelled(tmp_path, bert, ["a|b", "", "b"], options={"separator": "|"})
    assert parted.train["labels"][:] == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(DataError, match="'label' is '', expected a label"):
        labelled(tmp_path, bert, ["a", "", "b"])
    assert (
        "The labels 'Pos' and 'pos' differ in case alone, and are learned as two."
        in labelled(tmp_path, bert, ["Pos", "neg", "pos"]).notes
    )


def test_test_rows_with_another_number_of_texts(bert: Path, tmp_path: Path) -> None:
    one = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    two = [{**row, "text_pair": "bob"} for row in one]
    single, pair = write_jsonl(tmp_path / "one.jsonl", one), write_jsonl(tmp_path / "two.jsonl", two)
    with pytest.raises(DataError, match="test rows have no second text, and the training rows have one"):
        plan_of(recipe_for("seq-cls", pair, bert, data={"train": str(pair), "test": str(single)}))
    with pytest.raises(DataError, match="test rows have a second text, and the training rows have none"):
        plan_of(recipe_for("seq-cls", pair, bert, data={"train": str(single), "test": str(pair)}))


def _translations(path: Path, *codes: str) -> Path:
    words = {"en": "one two", "de": "red green", "fr": "blue"}
    return write_jsonl(path, [{"id": str(i), "translation": {code: words[code] for code in codes}} for i in range(3)])


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "arrow"])
def test_translation_columns(form: str, t5: Path, tmp_path: Path) -> None:
    """The usual form of translation sets, with a direction from the columns, the prefix or the base's name."""
    rows = [json.loads(line) for line in _translations(tmp_path / "a.jsonl", "en", "de").read_text().splitlines()]
    path = tmp_path / f"a.{form}"
    if form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif form == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    base = tmp_path / "opus-mt-de-en"
    shutil.copytree(t5, base)
    data = {"train": str(path), "test": str(path)}
    ways: list[tuple[dict[str, Any], tuple[str, str]]] = [
        ({"data": {**data, "columns": {"source": "translation.en", "target": "translation.de"}}}, ("en", "de")),
        ({"data": {**data, "columns": {"source": "en"}}}, ("en", "de")),
        ({"data": {**data, "columns": {"target": "en"}}}, ("de", "en")),
        ({"data": data, "options": {"source_prefix": "translate English to German: "}}, ("en", "de")),
        ({"data": data, "base": str(base)}, ("de", "en")),
    ]
    words = {"en": "one two", "de": "red green"}
    for flags, (source, target) in ways:
        recipe = recipe_for("seq2seq", path, **{"base": t5, **flags})
        table, test = load_tables(recipe.data, "seq2seq", 0)
        assert test is not None
        for read in (table, test):
            assert read.dataset.to_list() == [{"source": words[source], "target": words[target]}] * 3
        note = f"{table.path.name}: 'translation.{source}' is translated into 'translation.{target}'."
        assert table.notes == (() if len(flags["data"].get("columns", {})) == 2 else (note,))


def test_a_direction_that_cannot_be_told(t5: Path, tmp_path: Path) -> None:
    two, three = (_translations(tmp_path / f"{len(c)}.jsonl", *c) for c in (("en", "de"), ("en", "de", "fr")))
    with pytest.raises(DataError, match=r"holds en, de, and nothing says.*columns: \{source: en, target: de\}"):
        recipe_for("seq2seq", two, t5)
    with pytest.raises(DataError, match=r"holds en, de, fr, and nothing says"):
        recipe_for("seq2seq", three, t5, data={"train": str(three), "columns": {"source": "en"}})
    with pytest.raises(DataError, match=r"holds en, de, and the base or its prefix says en-ro"):
        recipe_for("seq2seq", two, t5, options={"source_prefix": "translate English to Romanian: "})
    with pytest.raises(DataError, match=r"no column 'translation.dr'.*Did you mean `translation.de`"):
        recipe_for(
            "seq2seq", two, t5, data={"train": str(two), "columns": {"source": "en", "target": "translation.dr"}}
        )
    ragged = write_jsonl(
        tmp_path / "r.jsonl", [{"translation": {"en": "one", "de": "red"}}, {"translation": {"en": "two"}}]
    )
    recipe = recipe_for("seq2seq", ragged, t5, data={"train": str(ragged), "columns": {"source": "en"}})
    with pytest.raises(DataError, match=r"r.jsonl:2: no 'translation.de'"):
        load_tables(recipe.data, "seq2seq", 0)


def test_columns_inside_others_are_read_and_filtered(llama: Path, tmp_path: Path) -> None:
    rows = [{"qa": {"ask": f"one {i}", "say": {"text": "red"}}, "meta": {"lang": "ab"[i % 2]}} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = {"train": str(path), "prompt": "qa.ask", "completion": "qa.say.text", "filter": {"meta.lang": "a"}}
    table, _ = load_tables(recipe_for("causal-lm", path, llama, data=data).data, "causal-lm", 0)
    assert table.dataset.to_list() == [{"prompt": f"one {i}", "completion": "red"} for i in (0, 2)]
