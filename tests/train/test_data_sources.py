"""Where rows may come from: folders, compressed files, Arrow, text, a place in a JSON file, the hub's cache."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from safetensors.torch import load_file
from tiny_train import write_jsonl

from veneer.train.data import load_table
from veneer.train.errors import DataError
from veneer.train.recipe import DataSpec, Recipe

ROWS = [{"prompt": f"question {number}", "completion": "yes\u2028no"} for number in range(5)]


def rows_of(path: Path | str, task: str = "causal-lm", **spec: Any) -> list[dict[str, Any]]:
    table = load_table(DataSpec(train=str(path), **spec), "train", task)
    assert table is not None
    return table.dataset.to_list()


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_compressed_files(tmp_path: Path, kind: str, name: str) -> None:
    mark = "\t" if name.endswith("tsv") else ","
    cells = [["prompt", "completion"], *([*row.values()] for row in ROWS)]
    text = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "a.json": json.dumps(ROWS),
    }.get(name, "".join(mark.join(row) + "\n" for row in cells))
    path = tmp_path / (name + kind)
    path.write_bytes(PACKERS[kind](text.encode()))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_compressed_files(tmp_path: Path, kind: str) -> None:
    text = "".join(json.dumps({"text": f"{number**7} {number**5}"}) + "\n" for number in range(20_000))
    whole = PACKERS[kind](text.encode())
    path = tmp_path / f"a.jsonl{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a whole \w+ file") as caught:
        rows_of(path)
    assert caught.value.file == str(path)


def test_a_bad_row_of_a_compressed_file_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n{"text": ""}\n'))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2: 'text' is empty"):
        rows_of(path)


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", ROWS[2:3])
    write_jsonl(folder / "a.jsonl", ROWS[:2])
    (folder / "deep" / "c.csv").write_text("prompt,completion\nquestion 3,yes\u2028no\n")
    (folder / "deep" / "d.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[4:]).encode()))
    write_jsonl(folder / ".hidden.jsonl", [{"other": 1}])
    (folder / "README.md").write_text("about")
    assert rows_of(folder) == ROWS
    write_jsonl(folder / "deep" / "e.jsonl", [ROWS[0], {"prompt": "x", "completion": ""}])
    with pytest.raises(DataError, match=r"e\.jsonl:2: 'completion' is empty"):
        rows_of(folder)


def test_arrow_files_and_what_datasets_saves(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    assert rows_of(tmp_path / "file.arrow") == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == ROWS
    (tmp_path / "bad.arrow").write_text("nonsense")
    with pytest.raises(DataError, match="not an Arrow file"):
        rows_of(tmp_path / "bad.arrow")


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first line\n\n  second\u2028line \n", encoding="utf-8")
    assert rows_of(path) == [{"text": "first line"}, {"text": "  second\u2028line "}]


def test_a_field_of_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"meta": [1], "data": {"train": ROWS, "test": ROWS[:1]}}))
    assert rows_of(path, field="data.train") == ROWS
    with pytest.raises(DataError, match=r"data.field: nothing at 'data.trian'.*Did you mean `train`"):
        rows_of(path, field="data.trian")
    with pytest.raises(DataError, match=r"found 1|expected"):
        rows_of(path)


def test_a_hub_name_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout in which `datasets` keeps what it has downloaded, read without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache" / "someone___rows" / "default" / "0.0.0" / "abc123"
    folder.mkdir(parents=True)
    for split, rows in {"train": ROWS, "validation": ROWS[:2]}.items():
        with datasets.arrow_writer.ArrowWriter(path=str(folder / f"rows-{split}.arrow")) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    made = {name: {"name": name, "num_examples": n, "num_bytes": 9} for name, n in (("train", 5), ("validation", 2))}
    features = {name: {"dtype": "string", "_type": "Value"} for name in ROWS[0]}
    info = {"builder_name": "parquet", "dataset_name": "rows", "config_name": "default",
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}, "splits": made,
            "features": features}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert rows_of("someone/rows") == ROWS
    test = load_table(DataSpec(train="someone/rows", test="someone/rows"), "test", "causal-lm")
    assert test is not None
    assert test.dataset.to_list() == ROWS[:2]
    with pytest.raises(DataError, match=r"no such file or data set: someone/else"):
        rows_of("someone/else")
    spec = DataSpec.model_validate({"train": [{"path": "someone/rows", "split": "trian"}]})
    with pytest.raises(DataError, match=r"no split 'trian' among train, validation; did you mean 'train'"):
        load_table(spec, "train", "causal-lm")


def test_a_misspelt_path_is_not_taken_for_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "rows", ROWS)
    for name in ("data/row", "elsewhere/rows.jsonl"):
        with pytest.raises(DataError, match="no such file: "):
            rows_of(name)


def test_a_folder_trains(causal: Callable[..., Recipe], tmp_path: Path, chats: Path) -> None:
    from veneer.train import run

    folder = tmp_path / "folder"
    folder.mkdir()
    lines = chats.read_bytes().splitlines(keepends=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:10])))
    (folder / "b.jsonl").write_bytes(b"".join(lines[10:]))
    train = {"max_steps": 2, "use_cpu": True, "learning_rate": 0.02}
    outs = []
    for name, path in (("one", folder), ("two", chats)):
        recipe = causal(data={"train": str(path)}, train=train, out=str(tmp_path / name))
        outs.append(load_file(Path(run(recipe).out, "adapter", "adapter_model.safetensors")))
    assert outs[0].keys() == outs[1].keys()
    assert all(torch.equal(value, outs[1][name]) for name, value in outs[0].items())
