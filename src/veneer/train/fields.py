"""Options checked against the dataclass that will take them: names, then types, before anything is built."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic

from veneer.train.errors import nearest
from veneer.train.yaml_source import Source

__all__ = ["check_options", "config_class", "describe_type", "training_arguments_class"]

#: adapter fields that the run fills in by itself
OWNED_ADAPTER = {
    "peft_type": "it follows from `adapter.method`",
    "task_type": "it follows from `task`",
    "inference_mode": "a new adapter is always trained",
    "auto_mapping": "it is derived from the base model",
    "base_model_name_or_path": "it follows from `base`",
    "revision": "set `base.revision`",
    "peft_version": "it is written for you",
}
#: TrainingArguments fields that the run fills in by itself
OWNED_TRAIN = {
    "output_dir": "set `out`",
    "seed": "set `seed` at the top of the recipe",
    "remove_unused_columns": "the batches are built by the task",
    "label_names": "the batches are built by the task",
    "push_to_hub": "a run never touches the network; push `out/adapter` afterwards",
    "resume_from_checkpoint": "a run starts from its base model",
}


def config_class(method: str) -> type | None:
    """The config dataclass of a method by its name in a recipe (any case), or None for an unknown one."""
    from veneer import registry

    return registry.config_class(method) if method.upper() in registry.types() else None


def method_names() -> list[str]:
    """Every method a recipe can name, sorted."""
    from veneer import registry

    return sorted(name.lower() for name in registry.types())


def training_arguments_class() -> type:
    """transformers' TrainingArguments, imported on first use."""
    from transformers import TrainingArguments

    return TrainingArguments


def check_options(
    cls: type | tuple[type, ...],
    options: Mapping[str, Any],
    section: str,
    source: Source,
    owned: Mapping[str, str],
) -> None:
    """Check the names and types of ``options`` against the dataclass ``cls``, or against several that share a section.

    Raises:
        RecipeError: at the first unknown key, key that the run owns, or value of a wrong type.
    """
    several = cls if isinstance(cls, tuple) else (cls,)
    known = {field.name for one in several for field in dataclasses.fields(one) if field.init}
    hints = {name: hint for one in several for name, hint in _hints(one).items()}
    for name, value in options.items():
        if name in owned:
            raise source.error((section, name), "cannot be set here", hint=f"{owned[name].capitalize()}.")
        if name not in known:
            near = nearest(name, known - owned.keys())
            hint = f"`{section}` takes the fields of {' and '.join(one.__name__ for one in several)}."
            raise source.error((section, name), "unknown key", near=near, hint=hint)
        _check_value(hints.get(name, Any), value, (section, name), source)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_value(hint: Any, value: Any, path: tuple[str, ...], source: Source) -> None:
    choices = _choices(hint)
    if choices and isinstance(value, str):
        if value not in choices:
            problem = f"{value!r} is not one of {', '.join(sorted(choices))}"
            raise source.error(path, problem, near=nearest(value, choices))
        return
    adapter = pydantic.TypeAdapter(hint, config=_config(hint))
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError:
        problem = f"wrong type: expected {describe_type(hint)}, found {_found(value)}"
        raise source.error(path, problem, hint=_type_hint(hint, value)) from None


def _config(hint: Any) -> pydantic.ConfigDict | None:
    # pydantic refuses a config beside a type that can carry one of its own
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, pydantic.BaseModel)):
        return None
    return pydantic.ConfigDict(arbitrary_types_allowed=True)


def _members(hint: Any) -> Iterable[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _choices(hint: Any) -> set[str]:
    """The values of the enums in a hint: a `SchedulerType | str` takes the enum's words, not any text."""
    members = [item for item in _members(hint) if isinstance(item, type) and issubclass(item, enum.Enum)]
    return {str(member.value) for item in members for member in item}


def describe_type(hint: Any) -> str:
    """A type hint in words, as an error message shows it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    parts = []
    for item in _members(hint):
        item = typing.get_args(item)[0] if typing.get_origin(item) is typing.Annotated else item
        origin = typing.get_origin(item)
        if item in words:
            parts.append(words[item])
        elif isinstance(item, type) and issubclass(item, pydantic.BaseModel):
            parts.append("a section of keys and values")
        elif origin is typing.Literal:
            parts.append(" or ".join(repr(choice) for choice in typing.get_args(item)))
        elif origin in (list, set, tuple) or item in (list, set, tuple):
            parts.append("a list")
        elif origin is dict or item is dict:
            parts.append("a mapping")
        else:
            parts.append(getattr(item, "__name__", str(item)))
    return " or ".join(dict.fromkeys(part for part in parts if part != "null" or len(parts) == 1))


def _found(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) < 60 else shown[:57] + '...'} ({type(value).__name__})"


def _type_hint(hint: Any, value: Any) -> str | None:
    if isinstance(value, str) and bool in _members(hint):
        return "Write `true` or `false`."
    if isinstance(value, str) and not {str} & set(_members(hint)):
        return "A number is written without quotes."
    return None
