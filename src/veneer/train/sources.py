"""Where rows come from: a path to its files, a list of sources to parts that are read one row after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from veneer.train.compressed import ending
from veneer.train.conditions import check_filter, row_filter
from veneer.train.errors import DataError, nearest
from veneer.train.named_labels import label_names, with_names
from veneer.train.nested import column_names
from veneer.train.readers import FORMATS, Row, head, rows_with_lines

if TYPE_CHECKING:
    from veneer.train.data_spec import DataSpec, SourceSpec

__all__ = ["SHIPPED", "Part", "Place", "conll_columns", "file_format", "find_files", "locate", "parts_of"]

#: sets that come with the package: name -> path of a split under the package's data folder
SHIPPED = {
    "orders": "orders/{split}.jsonl",
    "orders-later": "orders/later.jsonl",  # for measuring only
    "tickets-ner": "tickets_ner/{split}.conll",
}
#: what a file's or folder's name begins with, and the split that it says
SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "validation": "validation",
          "valid": "validation", "val": "validation", "dev": "validation"}  # fmt: skip
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Place(NamedTuple):
    """Where a row is: its file, the line it begins on (None for formats without lines), its number from 0."""

    file: Path
    line: int | None
    row: int

    def error(self, problem: str, hint: str | None = None) -> DataError:
        """A DataError about the row."""
        if self.line is None:
            return DataError(f"row {self.row + 1}: {problem}", file=self.file, hint=hint)
        return DataError(problem, file=self.file, line=self.line, hint=hint)

    def __str__(self) -> str:
        return f"{self.file.name} row {self.row + 1}" if self.line is None else f"{self.file.name}:{self.line}"


def _path(name: str, split: str) -> Path:
    path = Path(name).expanduser()
    if name in SHIPPED and not path.exists():
        return Path(__file__).parent.parent / "data" / SHIPPED[name].format(split=split)
    return path


def locate(name: str, split: str) -> Path:
    """The file of a data name: a path, or the split of a shipped set.

    Raises:
        DataError: no such file, or a folder.
    """
    path = _path(name, split)
    if path.is_dir():
        raise DataError(f"{name} is a folder", hint="Name one file in it.")
    return find_files(name, split)[0]


def find_files(name: str, split: str) -> tuple[Path, ...]:
    """The files of a data name: one file, all data files in a folder, or those of a shipped set.

    Raises:
        DataError: no such file, or a folder without any.
    """
    path = _path(name, split)
    if path.is_file():
        return (path,)
    if path.is_dir():
        return _of_split(_in_folder(path), path, split)
    siblings = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = f"Paths are read from {Path.cwd()}. The sets that come with veneer are {', '.join(SHIPPED)}."
    raise DataError(f"no such file: {name}", near=nearest(name, [*SHIPPED, *siblings]), hint=hint)


def _in_folder(folder: Path) -> tuple[Path, ...]:
    """The data files below a folder by name, hidden ones left out; of a folder that `datasets` saved, its rows."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and ending(path) in FORMATS]
    files = [p for p in files if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]
    saved = {path.parent for path in folder.rglob("state.json")}
    files = [path for path in files if path.parent not in saved or path.suffix == ".arrow"]
    files = [path for path in files if path.name != "dataset_dict.json"]
    if not files:
        endings = ", ".join(FORMATS)
        raise DataError("a folder without data files", file=folder, hint=f"Files of rows end in {endings}.")
    return tuple(files)


def _of_split(files: tuple[Path, ...], folder: Path, split: str) -> tuple[Path, ...]:
    """Of a folder's files, those of a split, where their names say (`test.jsonl`, `train-00000.parquet`, `test/...`).

    Files that say nothing are for training.
    """
    named = [_named_split(path.relative_to(folder)) for path in files]
    if split == "train":
        own = tuple(path for path, name in zip(files, named, strict=True) if name in (None, "train"))
        return own or files
    for wanted in dict.fromkeys((split, "test", "validation")):
        own = tuple(path for path, name in zip(files, named, strict=True) if name == wanted)
        if own:
            return own
    return files


def _named_split(path: Path) -> str | None:
    for part in path.parts:
        word = re.split(r"[-_.]", part.lower())[0]
        if word in SPLITS:
            return SPLITS[word]
    return None


def file_format(spec: DataSpec, path: Path) -> str:
    """The format of a file, by the recipe or by its ending. Raises DataError."""
    fmt = spec.format or FORMATS.get(ending(path))
    if fmt is None:
        kinds = sorted(set(FORMATS.values()))
        hint = f"Set `data.format` to one of {', '.join(kinds)}."
        raise DataError(f"cannot tell the format of {path.name} from its ending", file=path, hint=hint)
    return fmt


def conll_columns(spec: DataSpec, fmt: str) -> dict[str, int]:
    """The numbered columns of a CoNLL file. Raises DataError where names and numbers are mistaken."""
    columns = {"tokens": spec.tokens, "labels": spec.labels}
    for name, value in columns.items():
        if fmt == "conll" and isinstance(value, str):
            hint = f"Write a number from 0, for example `{name}: {0 if name == 'tokens' else -1}`."
            raise DataError("a CoNLL file has no column names", key=f"data.{name}", hint=hint)
        if fmt != "conll" and isinstance(value, int):
            hint = "Only CoNLL files have numbered columns."
            raise DataError(f"column {value} is a number", key=f"data.{name}", hint=hint)
    return {name: value for name, value in columns.items() if isinstance(value, int)}


@dataclass(frozen=True)
class Part:
    """One source of a split. ``spec`` is the `data` section with the source's own settings in it, ``files`` what it
    reads (none: a data set on the hub), ``key`` where in the recipe it stands.
    """

    spec: DataSpec
    source: SourceSpec
    files: tuple[Path, ...]
    split: str
    key: str

    @property
    def path(self) -> Path:
        """The file or folder it was given as."""
        return self.files[0] if len(self.files) == 1 else Path(self.source.path)

    @property
    def apart(self) -> tuple[Path, ...]:
        """The files of its folder that are another split's, by their names."""
        folder = Path(self.source.path).expanduser()
        return tuple(path for path in _in_folder(folder) if path not in self.files) if folder.is_dir() else ()

    def columns(self) -> list[str]:
        """The names of the columns, from the head of the first file. Raises DataError."""
        if not self.files:
            first = next(iter(self._hub(True)), None)
            if first is None:
                raise DataError("holds no rows", file=self.path)
            return column_names(first)
        file = self.files[0]
        fmt = file_format(self.spec, file)
        have = head(file, fmt, **conll_columns(self.spec, fmt), field=self.spec.field)
        for column, condition in self.spec.filter.items():
            check_filter(
                {column: condition}, have, f"{self.key}.filter" if column in self.source.filter else "data.filter"
            )
        return have

    def rows(self, counts: dict[str, int] | None = None, streaming: bool = False) -> Iterator[tuple[Place, Row]]:
        """The rows that its filter takes, in the order of its files, and where each one is.

        ``counts`` is told how many are `read` and how many `kept`. Raises DataError.
        """
        counts = {} if counts is None else counts
        keep = row_filter(self.spec.filter)
        counts |= {"read": 0, "kept": 0}
        for place, row in self._all(streaming):
            counts["read"] += 1
            try:
                taken = keep(row)
            except ValueError as error:
                hint = "Columns that may hold something else need another condition."
                raise place.error(f"data.filter: {error}", hint) from None
            if taken:
                counts["kept"] += 1
                yield place, row

    def _all(self, streaming: bool) -> Iterator[tuple[Place, Row]]:
        if not self.files:
            for number, row in enumerate(self._hub(streaming)):
                yield Place(self.path, None, number), row
        for file in self.files:
            fmt = file_format(self.spec, file)
            found = rows_with_lines(file, fmt, **conll_columns(self.spec, fmt), field=self.spec.field)
            for number, (line, row) in enumerate(found):
                yield Place(file, line, number), row

    def _hub(self, streaming: bool) -> Any:
        """The rows of a data set on the hub, or in the cache of `datasets`."""
        import datasets

        where = {"name": self.source.name, "revision": self.source.revision}
        try:
            splits = datasets.get_dataset_split_names(self.source.path, config_name=where["name"],
                                                      revision=where["revision"])  # fmt: skip
            split = self._hub_split(splits)
            rows = datasets.load_dataset(self.source.path, split=split, streaming=streaming, **where)
            named = label_names(rows.features.to_dict()) if rows.features else {}
            return (with_names(row, named) for row in rows) if named else rows
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            hint = f"Give a file, a folder, a data set on the hub or one of {', '.join(SHIPPED)}."
            raise DataError(
                f"no such file or data set: {self.source.path} ({reason})", key=self.key, hint=hint
            ) from error

    def _hub_split(self, splits: list[str]) -> str:
        wanted = [self.source.split] if self.source.split else [self.split, "validation"]
        wanted = [name for name in wanted if name == "train" or self.split != "train" or self.source.split]
        found = next((name for name in wanted if name in splits), None)
        if found is None:
            near = nearest(wanted[0], splits)
            meant = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"no split {wanted[0]!r} among {', '.join(splits)}{meant}")
        return found

    def fingerprint(self, exact: bool) -> Any:
        """What its files hold: by SHA-256, or by size and date where not ``exact``."""
        from veneer.files import sha256

        if not self.files:
            import datasets

            builder = datasets.load_dataset_builder(self.source.path, self.source.name, revision=self.source.revision)
            return builder.hash
        if exact:
            return {str(path): sha256(path) for path in self.files}
        return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in self.files}


def _source_names(spec: DataSpec, split: str) -> list[SourceSpec]:
    from veneer.train.data_spec import SourceSpec

    if split == "train":
        return [SourceSpec(path=spec.train)] if isinstance(spec.train, str) else list(spec.train)
    if split == "validation":
        name = spec.validation
    else:  # a shipped set brings its test rows, validation stands in for test
        own = spec.train if isinstance(spec.train, str) and spec.split is None else None
        own = own if "{split}" in SHIPPED.get(own or "", "") else None
        name = spec.test or spec.validation or own
    return [] if name is None else [SourceSpec(path=name)]


def parts_of(spec: DataSpec, split: str) -> list[Part]:
    """The sources of a split, none where the recipe names none. Filters and limits are for training rows.

    Raises:
        DataError: a file that is missing.
    """
    parts = []
    for number, source in enumerate(_source_names(spec, split)):
        listed = split == "train" and not isinstance(spec.train, str)
        key = f"data.{split}.{number}" if listed else f"data.{split}"
        train = split == "train"
        own = {
            "format": source.format or spec.format,
            "field": source.field or spec.field,
            "columns": {**spec.columns, **source.columns},
            "filter": {**spec.filter, **source.filter} if train else {},
            "limit": (source.limit or spec.limit) if train else None,
        }
        hub = _on_hub(source.path)
        try:
            files = () if hub else find_files(source.path, split)
        except DataError as error:
            error.key = error.key or (key if listed else None)
            raise
        parts.append(Part(spec.model_copy(update=own), source, files, split, key))
    return parts


def _on_hub(name: str) -> bool:
    """Whether a name reads `owner/name` and can be no file that was misspelt: nothing here is called `owner`."""
    path = Path(name)
    known = path.exists() or path.parent.exists() or ending(path) in FORMATS
    return HUB_NAME.fullmatch(name) is not None and not known
