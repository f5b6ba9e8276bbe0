"""YAML in, plain values and the line of every key out; plus the dotted overrides of the command line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from veneer.train.errors import RecipeError

__all__ = ["Source", "apply_override", "merge_flags", "read_yaml"]

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, and only true/false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$"),
    list("-+.0123456789"),
)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:float", _number)


@dataclass
class Source:
    """Where the values of a recipe came from, for error messages.

    ``lines`` maps a key path such as ``("adapter", "r")`` to its line in ``file`` (from 1); ``origin`` maps
    a path to the override that set it last.
    """

    # where a value came from does not make two recipes different
    file: str | None = field(default=None, compare=False)
    lines: dict[Path_, int] = field(default_factory=dict, compare=False)
    origin: dict[Path_, str] = field(default_factory=dict, compare=False)

    def error(self, path: Path_, problem: str, **more: Any) -> RecipeError:
        """A RecipeError about the value at ``path``, placed at the nearest known line above it."""
        key = ".".join(str(part) for part in path)
        for depth in range(len(path), -1, -1):
            if path[:depth] in self.origin:
                return RecipeError(problem, file=self.origin[path[:depth]], key=key, **more)
            if path[:depth] in self.lines:
                line = self.lines[path[:depth]]
                return RecipeError(problem, file=self.file, line=line, key=key, **more)
        return RecipeError(problem, file=self.file, key=key, **more)


def read_yaml(path: Path) -> tuple[dict[str, Any], Source]:
    """The mapping in a YAML file, and the line of every key in it.

    Raises:
        RecipeError: no such file, not YAML, not a mapping at the top, or a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "Give the path of a recipe (a .yaml file)."
        raise RecipeError("no such file", file=path, hint=hint) from None
    except IsADirectoryError:
        raise RecipeError("is a folder, not a recipe", file=path, hint="Give a .yaml file.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 text: {error.reason}", file=path) from None
    source = Source(file=str(path))
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, source
        _collect_lines(node, (), source)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise RecipeError(f"not valid YAML: {error.problem or error}", file=path, line=line) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        hint = "Write `key: value` lines, such as `task: causal-lm`."
        raise RecipeError("a recipe is a mapping of keys to values", file=path, line=1, hint=hint)
    return data, source


def _collect_lines(node: yaml.Node, path: Path_, source: Source) -> None:
    source.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, (*path, index), source)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Hashable, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            problem = f"given twice, first on line {seen[key]}"
            name = ".".join(str(part) for part in (*path, key))
            raise RecipeError(problem, file=source.file, line=line, key=name, hint="Keep one of them.")
        seen[key] = line
        source.lines[(*path, key)] = line
        _collect_lines(value_node, (*path, key), source)


def _parse_value(text: str, origin: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        problem = f"the value is not valid YAML: {text!r}"
        raise RecipeError(problem, file=origin, hint="Quote it, or write it as on a recipe's line.") from error
    finally:
        loader.dispose()


def apply_override(data: dict[str, Any], source: Source, override: str) -> None:
    """Write one ``section.key=value`` into ``data`` (the value is parsed as YAML)."""
    name, equals, text = override.partition("=")
    origin = f"--set {override}"
    if not equals or not name.strip():
        raise RecipeError("an override reads `key=value`", file=origin, hint="For example: --set adapter.r=32")
    path = tuple(name.strip().split("."))
    _put(data, source, path, _parse_value(text, origin), origin)


def merge_flags(data: dict[str, Any], source: Source, flags: dict[str, Any]) -> None:
    """Write flags over ``data``: `out="x"`, `data__train="x"` or `data={"train": "x"}`; None is skipped."""
    for name, value in flags.items():
        if value is None:
            continue
        path = tuple(name.split("__"))
        if isinstance(value, dict):
            merge_flags(data, source, {"__".join((*path, str(key))): item for key, item in value.items()})
        else:
            _put(data, source, path, str(value) if isinstance(value, Path) else value, f"--{path[-1]}")


#: what `section: text` is short for
SHORT = {"base": "name", "data": "train", "adapter": "method"}


def _put(data: dict[str, Any], source: Source, path: tuple[str, ...], value: Any, origin: str) -> None:
    here = data
    for depth, part in enumerate(path[:-1], start=1):
        inner = here.get(part)
        if depth == 1 and isinstance(inner, str) and part in SHORT:
            inner = {SHORT[part]: inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            problem = f"`{'.'.join(path[:depth])}` is a value, not a section"
            raise RecipeError(problem, file=origin, key=".".join(path))
        here[part] = inner
        here = inner
    last, old = path[-1], here.get(path[-1])
    if len(path) == 1 and last in {"data", "adapter"} and isinstance(old, dict) and isinstance(value, str):
        here, last, path = old, SHORT[last], (last, SHORT[last])
    here[last] = value
    source.origin[path] = origin
