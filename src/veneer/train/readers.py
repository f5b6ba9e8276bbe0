"""Data files to rows: each reader gives the rows and the line each one begins on, or says where it failed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.train.compressed import ending, opened
from veneer.train.errors import DataError, nearest
from veneer.train.named_labels import names_in_schema, with_names
from veneer.train.nested import column_names, schema_names

__all__ = ["FORMATS", "head", "read_conll", "read_rows", "rows_with_lines"]

#: file name ending -> format
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".arrow": "arrow",
    ".txt": "text",
}

Row = dict[str, Any]
TAB = "\t"
RECODE = "Save it as UTF-8, for example with `iconv -f latin1 -t utf-8` (or `-f utf-16`)."


def rows_with_lines(
    path: Path, fmt: str, tokens: int | None = None, labels: int | None = None, field: str | None = None
) -> Iterator[tuple[int | None, Row]]:
    """The rows of a file one after the other, each with its line (None where a format has no lines).

    ``tokens`` and ``labels`` number the columns of a CoNLL file; ``field`` is where in a JSON file its rows are
    (`data.train`).

    Raises:
        DataError: with the file, the line or row, and the reason.
    """
    if fmt == "conll":
        return read_conll(path, tokens, labels)
    if fmt == "json":
        return _read_json(path, field)
    readers: dict[str, Any] = {
        "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow, "text": _read_text
    }  # fmt: skip
    return readers[fmt](path)


def read_rows(
    path: Path, fmt: str, tokens: int | None = None, labels: int | None = None
) -> tuple[list[Row], list[int] | None]:
    """All rows of a file and their lines.

    Raises:
        DataError: a malformed file, or one without a row.
    """
    lines: list[int] = []
    rows: list[Row] = []
    for line, row in rows_with_lines(path, fmt, tokens, labels):
        rows.append(row)
        if line is not None:
            lines.append(line)
    if not rows:
        raise DataError("holds no rows", file=path, hint="Give a file with at least one row.")
    return rows, lines or None


def head(
    path: Path, fmt: str, tokens: int | None = None, labels: int | None = None, field: str | None = None
) -> list[str]:
    """The column names of a file, from its header or its first row; `a.b` is b in the object a."""
    if fmt == "parquet":
        import pyarrow.parquet

        return schema_names(_open_parquet(pyarrow.parquet.read_schema, path))
    for _, row in rows_with_lines(path, fmt, tokens, labels, field):
        return column_names(row)
    raise DataError("holds no rows", file=path, hint="Give a file with at least one row.")


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    # split at \n alone: str.splitlines also cuts at characters that are legal inside a value
    with opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"is not UTF-8 text: {error.reason}", file=path, line=number, hint=RECODE) from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    for number, text in _text_lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            problem = f"not valid JSON: {error.msg} at column {error.colno}"
            raise DataError(problem, file=path, line=number, hint="Write one JSON object a line.") from None
        if not isinstance(row, dict):
            problem = f"expected a JSON object, found {type(row).__name__}"
            raise DataError(problem, file=path, line=number, hint="Write one JSON object a line.")
        yield number, row


def _read_text(path: Path) -> Iterator[tuple[int, Row]]:
    """A row for each line that is not blank."""
    for number, text in _text_lines(path):
        if text.strip():
            yield number, {"text": text}


def _read_json(path: Path, field: str | None) -> Iterator[tuple[None, Row]]:
    try:
        with opened(path) as stream:
            data = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "One object a line is JSONL: set `data.format: jsonl`." if error.msg == "Extra data" else None
        raise DataError(f"not valid JSON: {error.msg}", file=path, line=error.lineno, hint=hint) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text: {error.reason}", file=path, hint=RECODE) from None
    if field is not None:
        data = _at(data, field, path)
    elif isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        if len(lists) != 1:
            hint = "Write a list of objects, or an object with one list in it, or say which it is with `data.field`."
            raise DataError(f"expected one list of rows, found {len(lists)}", file=path, hint=hint)
        data = lists[0]
    if not isinstance(data, list):
        raise DataError(f"expected a list of objects, found {type(data).__name__}", file=path)
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise DataError(f"row {number}: expected an object, found {type(row).__name__}", file=path)
        for part in _questions(row) if isinstance(row.get("paragraphs"), list) else (row,):
            yield None, part


def _questions(article: Row) -> Iterator[Row]:
    """A row for each question of an article in SQuAD's own files (Rajpurkar et al. 2016)."""
    for paragraph in article["paragraphs"]:
        for asked in paragraph["qas"]:
            answers = asked.get("answers", [])
            sides = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
            yield {"question": asked["question"], "context": paragraph["context"], "answers": sides}


def _at(data: Any, field: str, path: Path) -> Any:
    """The value at a dotted path of keys."""
    for name in field.split("."):
        if not isinstance(data, dict) or name not in data:
            have = list(data) if isinstance(data, dict) else []
            hint = f"The keys there are {', '.join(have)}." if have else None
            problem = f"nothing at {field!r} (no {name!r})"
            raise DataError(problem, file=path, key="data.field", near=nearest(name, have), hint=hint)
        data = data[name]
    return data


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    delimiter = _delimiter(path)
    with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        start = 1
        try:
            for cells in reader:
                if names is None:
                    names = [name.strip() for name in cells]
                    _check_header(names, path)
                elif cells:
                    if len(cells) != len(names):
                        problem = f"{len(cells)} values for {len(names)} columns"
                        hint = f"Quote values with {'tabs' if delimiter == TAB else f'`{delimiter}`'} in them."
                        raise DataError(problem, file=path, line=start, hint=hint)
                    yield start, dict(zip(names, cells))
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"not valid CSV: {error}", file=path, line=start) from None
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 text: {error.reason}", file=path, line=start, hint=RECODE) from None


def _delimiter(path: Path) -> str:
    """A tab in a .tsv; a comma otherwise, or what a first line without commas is parted by."""
    if ending(path) == ".tsv":
        return TAB
    _, first = next(_text_lines(path), (1, ""))
    return next((other for other in (";", TAB) if "," not in first and other in first), ",")


def _check_header(names: list[str], path: Path) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"column {sorted(twice)[0]!r} is there twice", file=path, line=1)


def _open_parquet(read: Any, path: Path) -> Any:
    import pyarrow

    try:
        return read(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a Parquet file: {str(error).splitlines()[0]}", file=path) from None


def _read_parquet(path: Path) -> Iterator[tuple[None, Row]]:
    import pyarrow.parquet

    for batch in _open_parquet(pyarrow.parquet.ParquetFile, path).iter_batches():
        named = names_in_schema(batch.schema)
        for row in batch.to_pylist():
            yield None, with_names(row, named)


def _read_arrow(path: Path) -> Iterator[tuple[None, Row]]:
    """Both of Arrow's layouts: the stream, which `datasets` writes, and the file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            try:
                reader = pyarrow.ipc.open_file(source)
                parts: Any = (reader.get_batch(number) for number in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                parts = pyarrow.ipc.open_stream(source)
            for batch in parts:
                named = names_in_schema(batch.schema)
                for row in batch.to_pylist():
                    yield None, with_names(row, named)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"not an Arrow file: {str(error).splitlines()[0]}", file=path) from None


def read_conll(path: Path, tokens: int | None = None, labels: int | None = None) -> Iterator[tuple[int, Row]]:
    """The sentences of a CoNLL file: `token label` lines (tab or spaces), a blank line between sentences.

    A line with a tab is cut at its tabs alone, so that its token may hold a space. ``tokens`` and ``labels``
    are column numbers from 0, negative from the end; they must be given for more than two columns.
    Yields the line a sentence begins on and `{"tokens": [...], "labels": [...]}`.
    """
    words: list[str] = []
    tags: list[str] = []
    width = start = 0
    for number, text in _text_lines(path):
        if not text.strip(" \t"):
            if words:
                yield start, {"tokens": words, "labels": tags}
            words, tags = [], []
            continue
        cells = text.split("\t") if "\t" in text else re.split(" +", text.strip(" "))
        if cells[0] == "-DOCSTART-":
            continue
        if not width:
            width = len(cells)
            _check_conll_columns(path, number, width, tokens, labels)
        if len(cells) != width:
            problem = f"{len(cells)} columns where the lines before have {width}"
            raise DataError(problem, file=path, line=number, hint="Write `token label` on each line.")
        word, tag = cells[0 if tokens is None else tokens], cells[-1 if labels is None else labels]
        if not word.strip() or not tag.strip():
            what = "token" if not word.strip() else "label"
            raise DataError(f"empty {what}", file=path, line=number, hint="Write `token label` on each line.")
        start = start if words else number
        words.append(word)
        tags.append(tag.strip())
    if words:
        yield start, {"tokens": words, "labels": tags}


def _check_conll_columns(path: Path, line: int, width: int, tokens: int | None, labels: int | None) -> None:
    if width < 2:
        hint = "Write `token label` on each line, and a blank line between sentences."
        raise DataError("one column, expected a token and a label", file=path, line=line, hint=hint)
    if width > 2 and (tokens is None or labels is None):
        hint = "Set `data.tokens: 0` and `data.labels: -1` (column numbers from 0; -1 is the last)."
        raise DataError(f"{width} columns: which hold the tokens and the labels?", file=path, line=line, hint=hint)
    for name, column in (("tokens", tokens), ("labels", labels)):
        if column is not None and not -width <= column < width:
            problem = f"`data.{name}` is column {column}, and the file has columns 0 to {width - 1}"
            raise DataError(problem, file=path, line=line, key=f"data.{name}")
