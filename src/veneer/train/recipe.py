"""The recipe of a training run: what it holds, how it is read, and every check that needs no weights."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from veneer.train import fields
from veneer.train.data_spec import DataSpec, Section
from veneer.train.errors import RecipeError, nearest
from veneer.train.nested import direction_of
from veneer.train.yaml_source import SHORT, Source, apply_override, merge_flags, read_yaml

__all__ = [
    "AdapterSpec",
    "BaseSpec",
    "DataSpec",
    "EvalSpec",
    "Recipe",
    "RecipeError",
    "build_recipe",
    "load_recipe",
]


class BaseSpec(Section):
    """The base model: a bundled name, a local folder, a .gguf file or a hub id.

    ``quantize``: hold its linear layers in 4 or 8 bits while it trains (backends/loading.py). ``kernels``: do its
    norms, rotary embeddings and gates in fewer passes while it trains (fused.py). ``matmul``: `int8` multiplies by the
    frozen weights in 8-bit integers while it trains, near to the same numbers and faster on CPUs made for it (int8.py).
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    trust_remote_code: bool = False
    quantize: Literal["nf4", "fp4", "int8", "int8-torchao", "int4-torchao", "hqq"] | None = None
    kernels: bool = True
    matmul: Literal["float", "int8"] = "float"


class AdapterSpec(Section):
    """The method by name, and any field of its config class beside it."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: str = "lora"

    @property
    def options(self) -> dict[str, Any]:
        """The fields for the method's config class."""
        return dict(self.model_extra or {})


class EvalSpec(Section):
    """What is measured on the test rows before and after training."""

    generate: bool = True
    max_new_tokens: int | None = Field(default=None, ge=1)
    metric: Literal["auto", "json", "exact", "translation", "summarization", "entities", "accuracy"] = "auto"
    batch_size: int = Field(default=32, ge=1)
    limit: int | None = Field(default=None, ge=1)
    samples: int = Field(default=8, ge=0)


class Recipe(Section):
    """One training run. ``out`` is a folder; it is written whole or not at all.

    ``options`` are the task's own: the fields of its Options class. ``tokens`` are added to the vocabulary and their
    rows trained.
    """

    task: str
    options: dict[str, Any] = Field(default_factory=dict)
    base: BaseSpec
    data: DataSpec
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    tokens: list[str] = Field(default_factory=list)
    train: dict[str, Any] = Field(default_factory=dict)
    eval: EvalSpec = Field(default_factory=EvalSpec)
    out: str = "out"
    overwrite: bool = False
    merge: bool = False
    seed: int = Field(default=42, ge=0)

    _source: Source = PrivateAttr(default_factory=Source)

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        short = {name: {SHORT[name]: data[name]} for name in SHORT if isinstance(data.get(name), str)}
        empty: dict[str, Any] = {
            name: {} for name in ("adapter", "train", "eval", "options") if name in data and data[name] is None
        }
        return {**data, **short, **empty}

    def error(self, *path: str | int, problem: str, **more: Any) -> RecipeError:
        """A RecipeError about one of this recipe's values, with its file and line."""
        return self._source.error(path, problem, **more)

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from html import escape

        return f"<pre>{escape(self.dump())}</pre>"

    def dump(self) -> str:
        """The recipe as YAML, defaults included: `load_recipe` reads it back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] = (), **flags: Any) -> Recipe:
    """Read a recipe, apply overrides and flags, and check all that can be checked without weights.

    Args:
        path: a YAML file, or None to build the recipe from ``flags`` alone.
        overrides: `section.key=value` texts, applied after the file.
        flags: values by name, applied last: `out="runs/a"`, `data__train="x.jsonl"`,
            `adapter={"r": 8}`. None means "not given".

    Raises:
        RecipeError: with the file, the line and the nearest valid name.
    """
    data, source = ({}, Source()) if path is None else read_yaml(Path(path))
    from veneer.train.checks import check_recipe

    recipe = build_recipe(data, overrides, flags, source)
    check_recipe(recipe)
    return recipe


def build_recipe(
    data: dict[str, Any], overrides: Sequence[str], flags: dict[str, Any], source: Source | None = None
) -> Recipe:
    """A recipe from plain values, unchecked but for its form.

    Raises:
        RecipeError: unknown keys and values of wrong types.
    """
    source = source or Source()
    for override in overrides:
        apply_override(data, source, override)
    merge_flags(data, source, flags)
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise _first_problem(error, source) from None
    recipe._source = source
    recipe.data._direction = direction_of(recipe.base.name, str(recipe.options.get("source_prefix", "")))
    return recipe


def _first_problem(error: pydantic.ValidationError, source: Source) -> RecipeError:
    first = min(error.errors(), key=lambda item: source.lines.get(_key_path(item["loc"]), 0))
    path, kind = _key_path(first["loc"]), first["type"]
    parent = _section_class(path[:-1])
    known = list(parent.model_fields) if parent else []
    if kind == "extra_forbidden":
        where = f"`{'.'.join(str(part) for part in path[:-1])}`" if path[:-1] else "a recipe"
        hint = f"The keys of {where} are {', '.join(known)}."
        return source.error(path, "unknown key", near=nearest(str(path[-1]), known), hint=hint)
    if kind == "missing":
        return source.error(path, "missing", hint=f"Add `{path[-1]}:` to {_where(path[:-1])}.")
    field = parent.model_fields.get(str(path[-1])) if parent else None
    if kind == "literal_error" and field is not None:
        choices = [choice for choice in _literals(field.annotation) if choice]
        problem = f"{first['input']!r} is not one of {', '.join(choices)}"
        return source.error(path, problem, near=nearest(str(first["input"]), choices))
    if kind.endswith(("_type", "_parsing", "_from_float", "_type_class")) and field is not None:
        found = f"{first['input']!r} ({type(first['input']).__name__})"
        expected = fields.describe_type(field.annotation)
        return source.error(path, f"wrong type: expected {expected}, found {found}")
    if kind in {"model_type", "model_attributes_type"}:
        return source.error(path, f"expected keys and values, found {first['input']!r}")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return source.error(path, f"{message}, found {first['input']!r}")


def _key_path(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A pydantic location without the names of union members (`("data", "tokens", "int")`)."""
    path: list[str | int] = []
    for part in loc:
        parent = _section_class(tuple(path))
        if path and parent is None and part in {"str", "int", "float", "bool"}:
            break
        if part in {"path", "sources"} and path and path[-1] == "train":
            continue  # which of two forms, not a key
        path.append(part)
    return tuple(path)


def _section_class(path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The section at a path: through the fields of sections, the places of lists and the keys of mappings."""
    kind: Any = Recipe
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = None if field is None else field.annotation
        else:
            kind = next((item for item in _items(kind) if isinstance(part, int) == (item[0] is list)), (None, None))[1]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _items(annotation: Any) -> list[tuple[type, Any]]:
    """(list or dict, what it holds) of the lists and mappings in an annotation."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [found for item in inner for found in _items(item)]
    if origin is typing.Annotated:
        return _items(inner[0])
    return [(origin, inner[-1])] if origin in (list, dict) else []


def _literals(annotation: Any) -> tuple[str, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(choice for item in typing.get_args(annotation) for choice in _literals(item))
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _where(path: tuple[str | int, ...]) -> str:
    return f"the section `{'.'.join(str(part) for part in path)}`" if path else "the recipe"
