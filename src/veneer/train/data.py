"""Data files to checked tables: find the file, find its columns, read it, and look at every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.errors import DataError, nearest
from veneer.train.readers import FORMATS, Row, head, read_rows, rows_with_lines

if TYPE_CHECKING:
    from datasets import Dataset

    from veneer.train.recipe import DataSpec

__all__ = [
    "SHIPPED",
    "Layout",
    "Table",
    "asked_table",
    "check_columns",
    "choose_layout",
    "find_layout",
    "load_table",
    "load_tables",
    "locate",
    "read_chunks",
]

#: sets that come with the package: name -> path of a split under the package's data folder
SHIPPED = {"orders": "orders/{split}.jsonl", "tickets-ner": "tickets_ner/{split}.conll"}


@dataclass(frozen=True)
class Layout:
    """Which columns a table's rows are read from: ``columns`` maps a role (`prompt`) to a column's name."""

    kind: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Table:
    """Checked rows under their role names, and where each one came from.

    ``dataset`` has one column a role; ``lines`` the line each row begins on, None for formats without lines.
    """

    path: Path
    layout: Layout
    dataset: Dataset
    lines: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.dataset)

    def error(self, row: int, problem: str, hint: str | None = None) -> DataError:
        """A DataError about row ``row`` (from 0)."""
        return _row_error(self.path, self.lines, row, problem, hint)

    def select(self, rows: Sequence[int]) -> Table:
        """The table of the given rows, in their order."""
        lines = None if self.lines is None else [self.lines[row] for row in rows]
        return Table(self.path, self.layout, self.dataset.select(rows), lines)


def _row_error(path: Path, lines: Sequence[int] | None, row: int, problem: str, hint: str | None = None) -> DataError:
    if lines is None:
        return DataError(f"row {row + 1}: {problem}", file=path, hint=hint)
    return DataError(problem, file=path, line=lines[row], hint=hint)


def locate(name: str, split: str) -> Path:
    """The file of a data name: a path, or the split of a shipped set.

    Raises:
        DataError: no such file.
    """
    path = Path(name).expanduser()
    if name in SHIPPED and not path.exists():
        path = Path(__file__).parent.parent / "data" / SHIPPED[name].format(split=split)
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{name} is a folder", hint="Name one file in it.")
    siblings = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = f"Paths are read from {Path.cwd()}. The sets that come with veneer are {', '.join(SHIPPED)}."
    raise DataError(f"no such file: {name}", near=nearest(name, [*SHIPPED, *siblings]), hint=hint)


def split_source(spec: DataSpec, split: str) -> str | None:
    """The name a split is read from; a shipped set brings its test rows, validation stands in for test."""
    if split == "train":
        return spec.train
    if split == "validation":
        return spec.validation
    own = spec.train if spec.train in SHIPPED and spec.split is None else None
    return spec.test or spec.validation or own


def _format(spec: DataSpec, path: Path) -> str:
    fmt = spec.format or FORMATS.get(path.suffix.lower())
    if fmt is None:
        kinds = sorted(set(FORMATS.values()))
        hint = f"Set `data.format` to one of {', '.join(kinds)}."
        raise DataError(f"cannot tell the format of {path.name} from its ending", file=path, hint=hint)
    return fmt


def _conll_columns(spec: DataSpec, fmt: str) -> dict[str, int]:
    columns = {"tokens": spec.tokens, "labels": spec.labels}
    for name, value in columns.items():
        if fmt == "conll" and isinstance(value, str):
            hint = f"Write a number from 0, for example `{name}: {0 if name == 'tokens' else -1}`."
            raise DataError("a CoNLL file has no column names", key=f"data.{name}", hint=hint)
        if fmt != "conll" and isinstance(value, int):
            hint = "Only CoNLL files have numbered columns."
            raise DataError(f"column {value} is a number", key=f"data.{name}", hint=hint)
    return {name: value for name, value in columns.items() if isinstance(value, int)}


def find_layout(spec: DataSpec, task: str, path: Path, fmt: str, asks: bool = False) -> Layout:
    """Which columns of a file the task reads, from the recipe or by their usual names; reads the file's head.

    With ``asks`` those it needs to predict: none that holds what is expected.

    Raises:
        DataError: a named column is missing, or none of the task's layouts is there.
    """
    have = head(path, fmt, **_conll_columns(spec, fmt))
    return choose_layout(spec, task, path, have, asks)


def choose_layout(spec: DataSpec, task: str, path: Path, have: Sequence[str], asks: bool = False) -> Layout:
    """As `find_layout`, from the names of the columns."""
    from veneer.train.tasks import get_task

    kind = get_task(task)
    layouts = kind.asks if asks else kind.layouts
    roles = list(dict.fromkeys(role for layout in (*kind.layouts, *layouts) for role in layout))
    named = _named_columns(spec, roles)
    if asks:  # columns with what is expected are not needed, and may be missing
        asked = {role for layout in layouts for role in layout}
        named = {role: place for role, place in named.items() if role in asked and place[1] in have}
    for key, column in named.values():
        if column not in have:
            hint = f"The columns are {', '.join(have)}."
            problem = f"no column {column!r} in {path}"
            raise DataError(problem, key=key, near=nearest(column, have), hint=hint)
    found = {role: _usual(role, kind.aliases.get(role, ()), have) for role in roles}
    found |= {role: column for role, (_, column) in named.items()}
    for layout in layouts:
        columns = {role: found[role] for role in layout}
        if named.keys() <= columns.keys() and all(column in have for column in columns.values()):
            return Layout("+".join(layout), columns)
    wanted = ", or ".join(" and ".join(f"`{role}`" for role in layout) for layout in layouts)
    first = layouts[-1][0]
    example = f"data.{first}: {have[0]}" if first in type(spec).model_fields else f"data.columns.{first}: {have[0]}"
    hint = f"{task} reads {wanted}; say which columns they are, for example `{example}`."
    raise DataError(f"the columns are {', '.join(have)}", file=path, line=None, hint=hint)


def _named_columns(spec: DataSpec, roles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The columns that a recipe names: role -> (its key in the recipe, the column)."""
    for role in spec.columns:
        if role not in roles:
            near, hint = nearest(role, roles), f"The task reads {', '.join(roles)}."
            raise DataError(f"{role!r} is not read", key=f"data.columns.{role}", near=near, hint=hint)
    fields = {role: getattr(spec, role) for role in roles if role in type(spec).model_fields}
    named = {role: (f"data.{role}", column) for role, column in fields.items() if isinstance(column, str)}
    return named | {role: (f"data.columns.{role}", column) for role, column in spec.columns.items()}


def _usual(role: str, aliases: Sequence[str], have: Sequence[str]) -> str:
    return next((name for name in (role, *aliases) if name in have), role)


def check_columns(spec: DataSpec, split: str, task: str) -> None:
    """Check that a split's file is there and has the columns its task needs; reads its head only.

    Raises:
        DataError: a missing file or column.
    """
    name = split_source(spec, split)
    if name is not None:
        path = locate(name, split)
        find_layout(spec, task, path, _format(spec, path))


def load_table(spec: DataSpec, split: str, task: str) -> Table | None:
    """Read and check one split; None where the recipe names none.

    Raises:
        DataError: with the file, the line or row, and the reason.
    """
    import datasets
    import pyarrow

    from veneer.train.tasks import get_task

    name = split_source(spec, split)
    if name is None:
        return None
    path = locate(name, split)
    fmt = _format(spec, path)
    layout = find_layout(spec, task, path, fmt)
    rows, lines = read_rows(path, fmt, **_conll_columns(spec, fmt))
    check, kept = get_task(task).check_row, []
    for number, row in enumerate(rows):
        picked = {role: row.get(column) for role, column in layout.columns.items()}
        problem = next((_missing(column, row) for column in layout.columns.values() if row.get(column) is None), "")
        problem = problem or check(layout, picked)
        if problem:
            raise _row_error(path, lines, number, problem)
        kept.append(picked)
    try:
        return Table(path, layout, datasets.Dataset.from_list(kept), lines)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise DataError(f"the rows do not agree on their types: {error}", file=path) from error


def read_chunks(spec: DataSpec, task: str, path: Path, size: int) -> Iterator[tuple[Table, list[Row]]]:
    """Rows that are to be predicted, ``size`` at a time: checked under their role names, and as they stand.

    Raises:
        DataError: with the file, the line or row, and the reason.
    """
    fmt = _format(spec, path)
    rows: list[Row] = []
    lines: list[int] = []
    layout: Layout | None = None
    done = 0
    for line, row in rows_with_lines(path, fmt, **_conll_columns(spec, fmt)):
        layout = layout or choose_layout(spec, task, path, list(row), asks=True)
        rows.append(row)
        lines += [] if line is None else [line]
        if len(rows) == size:
            yield asked_table(task, path, layout, rows, lines or None, done), rows
            done, rows, lines = done + len(rows), [], []
    if rows and layout is not None:
        yield asked_table(task, path, layout, rows, lines or None, done), rows


def asked_table(
    task: str, path: Path, layout: Layout, rows: Sequence[Row], lines: Sequence[int] | None, before: int = 0
) -> Table:
    """Rows that are to be predicted as a table; ``before`` is how many came before them in the file."""
    import datasets

    from veneer.train.tasks import get_task

    check, kept = get_task(task).check_ask, []
    for number, row in enumerate(rows):
        picked = {role: row.get(column) for role, column in layout.columns.items()}
        problem = next((_missing(column, row) for column in layout.columns.values() if row.get(column) is None), "")
        problem = problem or check(layout, picked)
        if problem:
            raise _row_error(path, lines, number if lines else before + number, problem)
        kept.append(picked)
    return Table(path, layout, datasets.Dataset.from_list(kept), lines)


def _missing(column: str, row: dict[str, Any]) -> str:
    return f"{column!r} is null" if column in row else f"no {column!r}; the row has {', '.join(map(repr, row))}"


def load_tables(spec: DataSpec, task: str, seed: int) -> tuple[Table, Table | None]:
    """The training table and the test table (its own file, or ``spec.split`` of the training rows).

    Raises:
        DataError: as `load_table`, or too few rows to split.
    """
    train, test = load_table(spec, "train", task), load_table(spec, "test", task)
    assert train is not None  # a recipe always names its training data
    if test is not None or spec.split is None:
        return train, test
    import random

    held_out = round(len(train) * spec.split)
    if not 0 < held_out < len(train):
        problem = f"a share of {spec.split} of {len(train)} rows leaves one part empty"
        raise DataError(problem, file=train.path, key="data.split")
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    return train.select(sorted(order[held_out:])), train.select(sorted(order[:held_out]))
