"""`data.filter`: conditions on columns to a function that takes a row or leaves it out."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from veneer.train.errors import DataError, nearest
from veneer.train.nested import value_at

if TYPE_CHECKING:
    from veneer.train.data_spec import Condition

__all__ = ["check_filter", "row_filter"]

Test = Callable[[Any], bool]


def check_filter(conditions: Mapping[str, Condition], have: Sequence[str], key: str) -> None:
    """Check that the columns that conditions name are among those that are there.

    Raises:
        DataError: with the nearest column.
    """
    for column, condition in conditions.items():
        if column not in have and condition.missing is None:
            hint = f"The columns are {', '.join(have)}. A filter names a file's own columns."
            raise DataError(f"no column {column!r}", key=f"{key}.{column}", near=nearest(column, have), hint=hint)


def row_filter(conditions: Mapping[str, Condition]) -> Callable[[Mapping[str, Any]], bool]:
    """A function that says whether a row meets all conditions.

    It raises ValueError, with the reason, where a value cannot be compared.
    """
    checks = [(column, *_tests(column, condition)) for column, condition in conditions.items()]

    def keep(row: Mapping[str, Any]) -> bool:
        for column, missing, tests in checks:
            value = value_at(row, column)
            if value is None or missing:
                if (value is None) != bool(missing):
                    return False
            elif not all(test(value) for test in tests):
                return False
        return True

    return keep


def _tests(column: str, condition: Condition) -> tuple[bool | None, list[Test]]:
    """Whether the value must be missing, and what it must pass otherwise."""
    asked = condition.asked
    missing = asked.pop("missing", None)
    return missing, [_MAKERS[name](column, value) for name, value in asked.items()]


def _same(column: str, wanted: Any) -> Test:
    return lambda value: _equal(value, wanted)


def _equal(value: Any, wanted: Any) -> bool:
    """As values, and as text where one of the two is text: a CSV file has nothing else."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    if isinstance(value, str) != isinstance(wanted, str):
        return str(value) == str(wanted)
    return bool(value == wanted)


def _among(column: str, wanted: list[Any]) -> Test:
    return lambda value: any(_equal(value, item) for item in wanted)


def _not(make: Callable[[str, Any], Test]) -> Callable[[str, Any], Test]:
    def opposite(column: str, wanted: Any) -> Test:
        test = make(column, wanted)
        return lambda value: not test(value)

    return opposite


def _number(compare: Callable[[Any, Any], bool], name: str) -> Callable[[str, Any], Test]:
    def make(column: str, bound: float) -> Test:
        def test(value: Any) -> bool:
            try:
                return compare(float(value), bound)
            except (TypeError, ValueError):
                raise ValueError(f"`{name}` compares numbers, and {column!r} is {value!r}") from None

        return test

    return make


def _length(compare: Callable[[Any, Any], bool], name: str) -> Callable[[str, Any], Test]:
    def make(column: str, bound: int) -> Test:
        def test(value: Any) -> bool:
            if not isinstance(value, str | list):
                raise ValueError(f"`{name}` counts characters or items, and {column!r} is {value!r}")
            return compare(len(value), bound)

        return test

    return make


def _text(name: str, find: Callable[[str], Callable[[str], bool]]) -> Callable[[str, Any], Test]:
    def make(column: str, wanted: str) -> Test:
        found = find(wanted)

        def test(value: Any) -> bool:
            if not isinstance(value, str):
                raise ValueError(f"`{name}` looks into text, and {column!r} is {value!r}")
            return found(value)

        return test

    return make


_contains = lambda wanted: lambda text: wanted in text
_matches = lambda wanted: lambda text, search=re.compile(wanted).search: search(text) is not None

_MAKERS: dict[str, Callable[[str, Any], Test]] = {
    "equals": _same,
    "not_equals": _not(_same),
    "any_of": _among,
    "none_of": _not(_among),
    "min": _number(operator.ge, "min"),
    "max": _number(operator.le, "max"),
    "min_length": _length(operator.ge, "min_length"),
    "max_length": _length(operator.le, "max_length"),
    "contains": _text("contains", _contains),
    "not_contains": _not(_text("not_contains", _contains)),
    "matches": _text("matches", _matches),
    "not_matches": _not(_text("not_matches", _matches)),
}
