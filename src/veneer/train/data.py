"""Sources of rows to checked tables: find their columns, read them, look at every row, split, mix."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.errors import DataError
from veneer.train.layouts import Layout, check_columns, choose_layout, joined, layouts_of, left_out
from veneer.train.mixing import Group, describe, hold_out, mix
from veneer.train.nested import column_names, value_at
from veneer.train.readers import Row, rows_with_lines
from veneer.train.sources import SHIPPED, Part, Place, conll_columns, file_format, locate, parts_of

if TYPE_CHECKING:
    from datasets import Dataset

    from veneer.train.data_spec import DataSpec

__all__ = [
    "SHIPPED",
    "Layout",
    "Table",
    "asked_table",
    "check_columns",
    "choose_layout",
    "layouts_of",
    "load_table",
    "load_tables",
    "locate",
    "pick",
    "read_chunks",
    "table_of",
]


@dataclass(frozen=True)
class Table:
    """Checked rows under their role names, and where each one came from.

    ``dataset`` has one column a role. ``path`` is the (first) source, ``notes`` what was left out and how it was mixed;
    ``workers`` how many processes make tokens of it.
    """

    path: Path
    layout: Layout
    dataset: Dataset
    places: Sequence[Place]
    notes: tuple[str, ...] = ()
    workers: int = 1

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lines(self) -> list[int] | None:
        """The line each row begins on, None for formats without lines."""
        lines = [place.line for place in self.places if place.line is not None]
        return lines if lines and len(lines) == len(self.places) else None

    def error(self, row: int, problem: str, hint: str | None = None) -> DataError:
        """A DataError about row ``row`` (from 0)."""
        return self.places[row].error(problem, hint)

    def select(self, rows: Sequence[int]) -> Table:
        """The table of the given rows, in their order."""
        return replace(self, dataset=self.dataset.select(rows), places=[self.places[row] for row in rows])


def pick(layout: Layout, task: str, place: Place, row: Row) -> Row:
    """A row under its role names. Raises DataError, with the reason, where it is not what the task reads."""
    from veneer.train.tasks import get_task

    picked = {role: _turns(value_at(row, column)) for role, column in layout.columns.items()}
    problem = next((_missing(column, row) for column in layout.columns.values() if value_at(row, column) is None), "")
    problem = problem or get_task(task).check_row(layout, picked)
    if problem:
        raise place.error(problem)
    return picked


#: other words for who speaks
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def _turns(value: Any) -> Any:
    """Turns written as {from, value} (ShareGPT's form) as {role, content}; any other value as it is."""
    if not isinstance(value, list) or not all(
        isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in value
    ):
        return value
    return [{"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in value]


def _read(part: Part, layout: Layout, task: str, seed: int) -> tuple[list[tuple[Place, Row]], tuple[str, ...]]:
    """The checked rows of a source that its filter and limit take, and what there is to say of them."""
    counts: dict[str, int] = {}
    limit, shuffled = part.spec.limit, part.spec.shuffle and part.split == "train"
    wanted = part.rows(counts) if shuffled or limit is None else itertools.islice(part.rows(counts), limit)
    rows = [(place, pick(layout, task, place, row)) for place, row in wanted]
    if not rows:
        problem = f"`data.filter` takes none of its {counts['read']} rows" if counts["read"] else "holds no rows"
        raise DataError(problem, file=part.path, hint="Give a file with at least one row.")
    if shuffled:
        random.Random(seed).shuffle(rows)
    notes = []
    if part.spec.filter:
        notes.append(f"{part.path.name}: the filter takes {counts['kept']:,} of {counts['read']:,} rows read.")
    if limit is not None and len(rows) >= limit:
        notes.append(f"{part.path.name}: {limit:,} rows are taken, as `limit` says.")
    return rows[:limit], tuple(notes)


def table_of(path: Path, layout: Layout, rows: Sequence[tuple[Place, Row]], notes: tuple[str, ...] = ()) -> Table:
    """A table of picked rows. Raises DataError where a column's values do not agree on a type."""
    import datasets
    import pyarrow

    try:
        even = [{role: row.get(role) for role in layout.columns} for _, row in rows]
        return Table(path, layout, datasets.Dataset.from_list(even), [p for p, _ in rows], notes)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise _uneven(layout, rows) or DataError(f"the rows do not agree on their types: {error}", file=path) from error


def _uneven(layout: Layout, rows: Sequence[tuple[Place, Row]]) -> DataError | None:
    """Which column is one kind of value in one row and another in another, where that is told at a glance."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    for role, column in layout.columns.items():
        first: tuple[Place, str] | None = None
        for place, row in rows:
            kind = kinds.get(type(row.get(role)))
            if first is not None and kind not in (None, first[1]):
                hint = "Rows of one run have the same kind of value in a column; convert these, or train on them apart."
                return place.error(f"{column!r} is {kind}, and {first[1]} at {first[0]}", hint)
            first = first or (None if kind is None else (place, kind))
    return None


def _load(spec: DataSpec, split: str, task: str, seed: int) -> tuple[Table, list[Group]] | None:
    """All rows of a split, and which of them each source gave."""
    parts = parts_of(spec, split)
    if not parts:
        return None
    rows: list[tuple[Place, Row]] = []
    groups: list[Group] = []
    layouts = layouts_of(parts, task)
    notes = left_out(parts, layouts, task)
    for part in parts:
        if part.apart:
            folder = Path(part.source.path).expanduser()
            named = ", ".join(path.relative_to(folder).as_posix() for path in part.apart[:4])
            what = f"{named}{' ...' if len(part.apart) > 4 else ''}"
            notes.append(f"{Path(part.source.path).name}: {what} not read as {split} rows, by the names of the files.")
    for part, layout in zip(parts, layouts, strict=True):
        own, said = _read(part, layout, task, seed)
        if "." in layout.columns.get("target", "") and not part.spec.columns.keys() >= {"source", "target"}:
            pair = [layout.columns[role] for role in ("source", "target")]
            notes.append(f"{part.path.name}: {pair[0]!r} is translated into {pair[1]!r}.")
        groups.append(Group(part.path.name, list(range(len(rows), len(rows) + len(own))), part.source.weight))
        rows += own
        notes += said
    table = table_of(parts[0].path, joined(layouts), rows, tuple(notes))
    return replace(table, workers=spec.workers), groups


def load_table(spec: DataSpec, split: str, task: str, seed: int = 0) -> Table | None:
    """Read and check one split, mixed where it has several sources; None where the recipe names none.

    Raises:
        DataError: with the file, the line or row, and the reason.
    """
    found = _load(spec, split, task, seed)
    return None if found is None else _mixed(spec, *found, seed)


def _mixed(spec: DataSpec, table: Table, groups: Sequence[Group], seed: int) -> Table:
    order = mix(groups, spec.stopping_strategy, seed)
    notes = (*table.notes, *describe(groups, order))
    plain = order == list(range(len(table)))
    return replace(table if plain else table.select(order), notes=notes)


def read_chunks(spec: DataSpec, task: str, path: Path, size: int) -> Iterator[tuple[Table, list[Row]]]:
    """Rows that are to be predicted, ``size`` at a time: checked under their role names, and as they stand.

    Raises:
        DataError: with the file, the line or row, and the reason.
    """
    fmt = file_format(spec, path)
    rows: list[Row] = []
    lines: list[int] = []
    layout: Layout | None = None
    done = 0
    for line, row in rows_with_lines(path, fmt, **conll_columns(spec, fmt), field=spec.field):
        layout = layout or choose_layout(spec, task, path, column_names(row), asks=True)
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
        place = Place(path, lines[number] if lines else None, before + number)
        picked = {role: _turns(value_at(row, column)) for role, column in layout.columns.items()}
        problem = next(
            (_missing(column, row) for column in layout.columns.values() if value_at(row, column) is None), ""
        )
        problem = problem or check(layout, picked)
        if problem:
            raise place.error(problem)
        kept.append((place, picked))
    return Table(path, layout, datasets.Dataset.from_list([row for _, row in kept]), [place for place, _ in kept])


def _missing(column: str, row: dict[str, Any]) -> str:
    return (
        f"{column!r} is null"
        if column in column_names(row)
        else f"no {column!r}; the row has {', '.join(map(repr, row))}"
    )


def load_tables(spec: DataSpec, task: str, seed: int) -> tuple[Table, Table | None]:
    """The training table and the test table (its own file, or ``spec.split`` of each source's training rows).

    Raises:
        DataError: as `load_table`, or too few rows to split.
    """
    found, test = _load(spec, "train", task, seed), load_table(spec, "test", task)
    assert found is not None  # a recipe always names its training data
    table, groups = found
    if test is not None or spec.split is None:
        return _mixed(spec, table, groups, seed), test
    held: list[int] = []
    for number, group in enumerate(groups):
        try:
            groups[number], out = hold_out(group, spec.split, seed)
        except ValueError as error:
            raise DataError(str(error), file=table.places[group.rows[0]].file, key="data.split") from None
        held += out
    return _mixed(spec, table, groups, seed), replace(table.select(held), notes=())
