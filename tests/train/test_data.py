"""Readers and row checks: what is read, and the file, line or row and reason of what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from veneer.train.data import Table, load_table, load_tables
from veneer.train.errors import DataError
from veneer.train.readers import read_conll, read_rows
from veneer.train.recipe import DataSpec

Make = Callable[[str, str], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


def load(path: Path, task: str = "causal-lm", **spec: Any) -> Table:
    table = load_table(DataSpec(train=str(path), **spec), "train", task)
    assert table is not None
    return table


def refused(path: Path, task: str = "causal-lm", **spec: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path, task, **spec)
    assert caught.value.file == str(path)
    return caught.value


ROWS = [{"prompt": "a, b", "completion": 'say "x"'}, {"prompt": "line\nbreak", "completion": "é\u2028\x85"}]


def test_every_format_gives_the_same_rows(make: Make, tmp_path: Path) -> None:
    files = [
        make("a.jsonl", "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in ROWS)),
        make("a.json", json.dumps(ROWS)),
        make("b.json", json.dumps({"version": 1, "data": ROWS})),
        make("a.csv", 'prompt,completion\n"a, b","say ""x"""\n"line\nbreak",é\u2028\x85\n'),
        make("a.tsv", 'prompt\tcompletion\na, b\t"say ""x"""\n"line\nbreak"\té\u2028\x85\n'),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in [*files, tmp_path / "a.parquet"]:
        assert load(path).dataset.to_list() == ROWS, path.name


def test_lines_are_those_of_the_file(make: Make) -> None:
    assert load(make("a.jsonl", '\n{"text": "x"}\n\n{"text": "y"}\n')).lines == [2, 4]
    assert load(make("a.csv", 'text\n"x\ny"\nz\n')).lines == [2, 4]
    assert load(make("a.json", '[{"text": "x"}]')).lines is None


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": }\n', 2, "not valid JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', 2, "expected a JSON object, found list"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', 2, "no 'text'; the row has 'txt'"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', 2, "'text' is null"),
        ("a.jsonl", '{"text": "x"}\n{"text": " "}\n', 2, "'text' is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', 2, "'text' is int, expected text"),
        ("a.jsonl", "\n", None, "holds no rows"),
        ("a.json", '{"a": 1}', None, "expected one list of rows, found 0"),
        ("a.json", "[1]", None, "row 1: expected an object"),
        ("a.json", '[{"text": "x"},\n{"text": }]', 2, "not valid JSON"),
        ("a.json", '[{"text": "x"}, {"text": ""}]', None, "row 2: 'text' is empty"),
        ("a.csv", "text,b\nx,1\ny\n", 3, "1 values for 2 columns"),
        ("a.csv", "text,text\nx,1\n", 1, "is there twice"),
        ("a.csv", 'text\n"x\n', 2, "not valid CSV"),
        ("a.parquet", "nonsense", None, "not a Parquet file"),
    ],
)
def test_bad_files(make: Make, name: str, text: str, line: int | None, words: str) -> None:
    error = refused(make(name, text))
    assert error.line == line
    assert words in error.problem


def test_jsonl_under_a_json_name_gets_a_hint(make: Make) -> None:
    assert "data.format: jsonl" in str(refused(make("a.json", '{"text": "x"}\n{"text": "y"}\n')))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    assert refused(path).line == 2


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "not a list"),
        ([], "is empty"),
        ([{"content": "x"}], "turn 1 has no 'role'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ["x"]}], "turn 2 (assistant)"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}],
            "turn 2 (assistant) is empty",
        ),
        ([{"role": "user", "content": "x"}], "no turn of the assistant to learn from; the roles are user"),
    ],
)
def test_bad_chats(make: Make, messages: Any, words: str) -> None:
    good = {"messages": [{"role": "assistant", "content": "x"}]}
    error = refused(make("a.jsonl", json.dumps(good) + "\n" + json.dumps({"messages": messages}) + "\n"))
    assert error.line == 2
    assert words in error.problem


@pytest.mark.parametrize(
    ("tokens", "labels", "words"),
    [
        (["a", "b"], ["O"], "2 tokens and 1 labels"),
        ("a b", ["O"], "'tokens' is str, expected a list"),
        ([], [], "'tokens' is empty"),
        (["a", " "], ["O", "O"], "holds ' ' at word 2"),
        (["a"], [1], "'labels' holds 1 at word 1"),
    ],
)
def test_bad_word_rows(make: Make, tokens: Any, labels: Any, words: str) -> None:
    row = json.dumps({"tokens": tokens, "labels": labels})
    error = refused(make("a.jsonl", '{"tokens": ["a"], "labels": ["O"]}\n' + row + "\n"), "token-cls")
    assert error.line == 2
    assert words in error.problem


def test_conll_tabs_spaces_and_breaks(make: Make) -> None:
    tabs = make("a.conll", "-DOCSTART-\tO\n\nNew York\tB-loc\r\n.\tO\n \t\n\nhi\u2028there\tO")
    assert list(read_conll(tabs)) == [
        (3, {"tokens": ["New York", "."], "labels": ["B-loc", "O"]}),
        (7, {"tokens": ["hi\u2028there"], "labels": ["O"]}),
    ]
    spaces = make("b.conll", "a  O\nb O\n\n")
    assert read_rows(spaces, "conll") == ([{"tokens": ["a", "b"], "labels": ["O", "O"]}], [1])


def test_conll_extra_columns_must_be_named(make: Make) -> None:
    path = make("a.conll", "1 Rome NNP B-loc\n2 is VB O\n")
    error = refused(path, "token-cls")
    assert (error.line, "4 columns" in error.problem) == (1, True)
    table = load(path, "token-cls", tokens=1, labels=-1)
    assert table.dataset.to_list() == [{"tokens": ["Rome", "is"], "labels": ["B-loc", "O"]}]
    assert "columns 0 to 3" in refused(path, "token-cls", tokens=7, labels=0).problem
    with pytest.raises(DataError, match="no column names"):
        load(path, "token-cls", tokens="word")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a O\nb\n", 2, "1 columns where the lines before have 2"),
        ("a\n", 1, "one column"),
        ("a\tO\n\tO\n", 2, "empty token"),
        ("a\tO\nb\t\n", 2, "empty label"),
        ("\n\n", None, "holds no rows"),
    ],
)
def test_bad_conll(make: Make, text: str, line: int | None, words: str) -> None:
    error = refused(make("a.conll", text), "token-cls")
    assert error.line == line
    assert words in error.problem


def test_split_is_seeded_and_whole(make: Make) -> None:
    path = make("a.jsonl", "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(10)))
    spec = DataSpec(train=str(path), split=0.3)
    train, test = load_tables(spec, "causal-lm", seed=1)
    assert test is not None
    assert (len(train), len(test)) == (7, 3)
    assert sorted(train.dataset["text"][:] + test.dataset["text"][:]) == [f"row {i}" for i in range(10)]
    assert [f"row {line - 1}" for line in test.lines or []] == test.dataset["text"][:]
    again = load_tables(spec, "causal-lm", seed=1)[1]
    other = load_tables(spec, "causal-lm", seed=2)[1]
    assert again is not None
    assert other is not None
    assert again.dataset.to_list() == test.dataset.to_list() != other.dataset.to_list()
    with pytest.raises(DataError, match="leaves one part empty"):
        load_tables(DataSpec(train=str(path), split=0.01), "causal-lm", seed=1)


def test_wnut17_is_read_whole(wnut17: Path) -> None:
    counts = {}
    for name in ("train", "dev", "test"):
        table = load(wnut17 / f"{name}.conll", "token-cls")
        labels = Counter(label for row in table.dataset["labels"] for label in row)
        counts[name] = (len(table), sum(labels.values()), sum(n for k, n in labels.items() if k[0] == "B"))
    # sentences, tokens and entities as the WNUT-17 shared task reports them (Derczynski et al. 2017, table 2)
    assert counts["train"][1:] == (62730, 1975)
    assert counts["dev"][1:] == (15733, 836)
    assert counts["test"] == (1287, 23394, 1079)
