"""The patterns of a config: read and checked once, compiled once, matched against module names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar

from veneer.graph import name_tails

T = TypeVar("T")
Patterns = str | tuple[str, ...] | None


@dataclass(frozen=True)
class TargetSpec:
    """The part of a config that says where to adapt, read once and checked."""

    target_modules: Patterns = None
    exclude_modules: Patterns = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    task_type: str | None = None
    allow_unmatched: bool = False

    @classmethod
    def from_config(cls, config: Any) -> TargetSpec:
        """Reads any object with PEFT's field names; fields it lacks keep their default.

        Raises:
            TypeError: a field holds something else than names (or numbers, for ``layers_to_transform``).
            ValueError: ``layers`` and ``layers_to_transform`` are both given.
        """
        task = getattr(config, "task_type", None)
        layers = getattr(config, "layers", None)
        numbers = getattr(config, "layers_to_transform", None)
        numbers = [numbers] if isinstance(numbers, int) else list(numbers or ())
        if wrong := [n for n in numbers if not isinstance(n, int)]:
            raise TypeError(f"layers_to_transform takes layer numbers, not {wrong[0]!r}")
        spec = cls(
            target_modules=_patterns(config, "target_modules"),
            exclude_modules=_patterns(config, "exclude_modules"),
            layers_to_transform=tuple(numbers),
            layers_pattern=_names(config, "layers_pattern"),
            layers=(str(layers),) if isinstance(layers, (str, int)) else tuple(str(x) for x in layers or ()),
            modules_to_save=_names(config, "modules_to_save"),
            target_parameters=_names(config, "target_parameters"),
            task_type=task.value if isinstance(task, Enum) else task,
            allow_unmatched=getattr(config, "allow_unmatched", False),
        )
        if spec.layers and spec.layers_to_transform:
            raise ValueError("give either `layers` (words) or `layers_to_transform` (numbers), not both")
        return spec


def _patterns(config: Any, name: str) -> Patterns:
    """A string stays a string (a full-match pattern); a list of names keeps its order, a set is sorted."""
    value = getattr(config, name, None)
    if value is None or isinstance(value, str):
        return value
    items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
    if wrong := [item for item in items if not isinstance(item, str)]:
        raise TypeError(f"{name} takes module names, not {wrong[0]!r}")
    return tuple(items)


def _names(config: Any, name: str) -> tuple[str, ...]:
    value = _patterns(config, name)
    return (value,) if isinstance(value, str) and value else tuple(value or ())


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{where}: {pattern!r} is no regular expression: {error}; names go in a list, ['q_proj', 'v_proj']"
        ) from error


def layer_index(name: str, layers_pattern: str | Iterable[str] | None = None, *, top_level: bool = False) -> int | None:
    """The layer number in a module's name, or None.

    Without ``layers_pattern``: the first ``.<anything>.<number>.`` in the name, so a list at the very top
    of the model (``layers.0.mlp``) has no number unless ``top_level``. With patterns: the number after the
    first component that fully matches one of them, the patterns tried in order.
    """
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or ())
    patterns = tuple(pattern for pattern in patterns if pattern)
    if not patterns:
        found = _FIRST_NUMBER.search(name) or (_TOP_NUMBER.match(name) if top_level else None)
        return int(found[1]) if found else None
    for pattern in patterns:
        rule = compile_pattern(rf"(?:.*?\.)?(?:{pattern})\.(?P<veneer_layer>\d+)\.", "layers_pattern")
        if found := rule.match(name):
            return int(found["veneer_layer"])
    return None


_FIRST_NUMBER = re.compile(r"\.[^.]*\.(\d+)\.")
_TOP_NUMBER = re.compile(r"[^.]*\.(\d+)\.")


def resolve_pattern(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value for one layer from ``rank_pattern`` or ``alpha_pattern``: the first key that matches.

    A key is a regular expression for the name's end, from a component's start on; ``^`` anchors it to the
    whole name.
    """
    for key, value in (patterns or {}).items():
        if _fits(key, name):
            return value
    return default


def unused_patterns(patterns: Mapping[str, Any] | None, names: Iterable[str]) -> list[str]:
    """The keys of a ``rank_pattern`` or ``alpha_pattern`` that match none of the adapted ``names``."""
    adapted = list(names)
    return [key for key in patterns or {} if not any(_fits(key, name) for name in adapted)]


def _fits(key: str, name: str) -> bool:
    return compile_pattern(rf"(?:.*\.)?(?:{key})$", "rank_pattern/alpha_pattern").match(name) is not None


def suffix_or_pattern(patterns: Patterns, field_name: str) -> Callable[[str], bool]:
    if not patterns:
        return lambda name: False
    if isinstance(patterns, str):
        rule = compile_pattern(patterns, field_name)
        return lambda name: rule.fullmatch(name) is not None
    entries = frozenset(patterns)
    return lambda name: not entries.isdisjoint(name_tails(name))


def near_names(pattern: str, names: Iterable[str]) -> str:
    """ ", did you mean ...": name ends of the model that look like the pattern."""
    depth = pattern.count(".") + 1
    tails = dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names)
    tails = {tail: None for tail in tails if not tail.rpartition(".")[2].isdecimal()}
    if near := difflib.get_close_matches(pattern, tails, n=3, cutoff=0.6):
        return f"; did you mean {' or '.join(map(repr, near))}?"
    leaves = list(dict.fromkeys(tail.rpartition(".")[2] for tail in tails))
    words = [word for word in re.findall(r"[A-Za-z]\w+", pattern) if word not in leaves]
    close = dict.fromkeys(n for word in words for n in difflib.get_close_matches(word, leaves, n=2, cutoff=0.7))
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; the model has {', '.join(leaves[-12:])}" if leaves else ""


def number_ranges(indices: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1][1:] = [i]
        else:
            runs.append([i])
    return ", ".join("-".join(map(str, run)) for run in runs)
