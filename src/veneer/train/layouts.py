"""Which columns of a source a task reads: as the recipe names them, or by their usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.errors import DataError, nearest
from veneer.train.nested import languages, leaves, named_column
from veneer.train.sources import Part, parts_of

if TYPE_CHECKING:
    from veneer.train.data_spec import DataSpec

__all__ = ["Layout", "check_columns", "choose_layout", "joined", "layouts_of", "left_out"]


@dataclass(frozen=True)
class Layout:
    """Which columns a table's rows are read from: ``columns`` maps a role (`prompt`) to a column's name.

    ``kind`` joins the roles of a row (`prompt+completion`). Of rows of several kinds it names all
    (`messages|prompt+completion`), and a row has the roles of one of them; the others are None.
    """

    kind: str
    columns: dict[str, str]

    def of_row(self, row: Mapping[str, Any]) -> str:
        """The kind of one row."""
        kinds = self.kind.split("|")
        return next((kind for kind in kinds if all(row.get(role) is not None for role in kind.split("+"))), kinds[0])


def joined(layouts: Sequence[Layout]) -> Layout:
    """The layout of a table whose rows have one of several."""
    kinds = dict.fromkeys(layout.kind for layout in layouts)
    if len(kinds) == 1:
        return layouts[0]
    return Layout("|".join(kinds), {role: name for layout in layouts for role, name in layout.columns.items()})


def choose_layout(
    spec: DataSpec, task: str, path: Path, have: Sequence[str], asks: bool = False, only: Sequence[str] | None = None
) -> Layout:
    """Which of the columns that a source has the task reads, from the recipe or by their usual names.

    With ``asks`` those it needs to predict: none that holds what is expected. With ``only`` among the task's layouts
    of these kinds.

    Raises:
        DataError: a named column is missing, or none of the task's layouts is there.
    """
    from veneer.train.tasks import get_task

    kind = get_task(task)
    layouts = kind.asks if asks else kind.layouts
    layouts = tuple(layout for layout in layouts if only is None or "+".join(layout) in only)
    roles = list(dict.fromkeys(role for layout in (*kind.layouts, *layouts) for role in layout))
    named = _named_columns(spec, roles)
    if asks:  # columns with what is expected are not needed, and may be missing
        asked = {role for layout in layouts for role in layout}
        named = {role: place for role, place in named.items() if role in asked and named_column(place[1], have) in have}
    named = {role: (key, named_column(column, have)) for role, (key, column) in named.items()}
    for key, column in named.values():
        if column not in have:
            hint = f"The columns are {', '.join(leaves(have))}."
            problem = f"no column {column!r} in {path}"
            raise DataError(problem, key=key, near=nearest(column, have), hint=hint)
    found = {role: _usual(role, kind.aliases.get(role, ()), have) for role in roles}
    if kind.translates and not any(found[role] in have for role in ("source", "target")):
        found |= languages({role: column for role, (_, column) in named.items()}, have, spec.direction, asks)
    found |= {role: column for role, (_, column) in named.items()}
    for layout in layouts:
        columns = {role: found[role] for role in layout}
        if named.keys() <= columns.keys() and all(column in have for column in columns.values()):
            return Layout("+".join(layout), columns)
    wanted = ", or ".join(" and ".join(f"`{role}`" for role in layout) for layout in layouts)
    hint = f"{task} reads {wanted}; say which columns they are, for example `{_example(spec, layouts, have)}`."
    raise DataError(f"the columns are {', '.join(leaves(have))}", file=path, line=None, hint=hint)


def _example(spec: DataSpec, layouts: Sequence[Sequence[str]], have: Sequence[str]) -> str:
    """A recipe's lines for the layout that takes the most of the columns that are there."""
    have = leaves(have)
    roles = max((layout for layout in layouts if len(layout) <= len(have)), key=len, default=layouts[-1])
    free = [column for column in have if column not in roles]
    named = [(role, free.pop(0)) for role in roles if role not in have and free]
    pairs = ", ".join(f"{role}: {column}" for role, column in named)
    direct = all(role in type(spec).model_fields for role, _ in named)
    return f"data: {{{pairs}}}" if direct else f"data: {{columns: {{{pairs}}}}}"


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


def layouts_of(parts: Sequence[Part], task: str) -> list[Layout]:
    """The columns of each source: its own where the task reads rows of several kinds; otherwise the first of the task's
    layouts that all have.

    Raises:
        DataError: a missing column, or sources without a layout in common where the task needs one.
    """
    from veneer.train.tasks import get_task

    columns = [part.columns() for part in parts]
    found = [_layout(part, task, have) for part, have in zip(parts, columns)]
    if len({layout.kind for layout in found}) == 1 or get_task(task).mixes:
        return found
    for kind in ("+".join(layout) for layout in get_task(task).layouts):
        try:
            return [_layout(part, task, have, [kind]) for part, have in zip(parts, columns)]
        except DataError:
            continue
    other = next(i for i, layout in enumerate(found) if layout.kind != found[0].kind)
    problem = f"{parts[other].path} has {found[other].kind} where {parts[0].path} has {found[0].kind}"
    hint = "Sources that are mixed hold the same kind of rows; train on them one after the other, or convert one."
    raise DataError(problem, key=parts[other].key, hint=hint)


def left_out(parts: Sequence[Part], layouts: Sequence[Layout], task: str) -> list[str]:
    """What is said of columns that a source has and the others lack, so that none of it is read."""
    notes = []
    for part, layout in zip(parts, layouts) if len(parts) > 1 else ():
        whole = _layout(part, task, part.columns())
        lost = [column for role, column in whole.columns.items() if role not in layout.columns]
        if lost and layout.kind in {other.kind for other in layouts if other is not layout}:
            named = ", ".join(map(repr, lost))
            notes.append(f"{part.path.name}: {named} left out, for not all sources have it.")
    return notes


def _layout(part: Part, task: str, have: Sequence[str], only: Sequence[str] | None = None) -> Layout:
    try:
        return choose_layout(part.spec, task, part.path, have, only=only)
    except DataError as error:
        role = (error.key or "").removeprefix("data.columns.")
        if role in part.source.columns:
            error.key = f"{part.key}.columns.{role}"
        raise


def check_columns(spec: DataSpec, split: str, task: str) -> None:
    """Check that a split's files are there and have the columns its task needs; reads their heads only.

    Raises:
        DataError: a missing file or column.
    """
    parts = parts_of(spec, split)
    if parts:
        layouts_of(parts, task)
