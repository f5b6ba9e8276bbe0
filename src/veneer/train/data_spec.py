"""The `data` section of a recipe: where rows come from, which of them are taken, and which columns are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

__all__ = ["Condition", "DataSpec", "Section", "SourceSpec"]

Format = Literal["jsonl", "json", "csv", "parquet", "arrow", "conll", "text"]
Scalar = str | int | float | bool


class Section(BaseModel):
    """A part of a recipe: unknown keys and values of wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


class Condition(Section):
    """What a column of a row must be for the row to be taken; all that is given must hold.

    A value alone stands for ``equals``, a list for ``any_of``. ``min`` and ``max`` compare numbers (text that reads as
    one counts), ``min_length`` and ``max_length`` characters of text or items of a list; ``contains`` and ``matches``
    (a regular expression, found anywhere) look into text. A column that is missing or null meets no condition but
    ``missing: true``.
    """

    equals: Scalar | None = None
    not_equals: Scalar | None = None
    any_of: list[Scalar] | None = None
    none_of: list[Scalar] | None = None
    min: float | None = None
    max: float | None = None
    min_length: int | None = Field(default=None, ge=0)
    max_length: int | None = Field(default=None, ge=0)
    contains: str | None = None
    not_contains: str | None = None
    matches: str | None = None
    not_matches: str | None = None
    missing: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: Any) -> Any:
        if isinstance(data, list):
            return {"any_of": data}
        return {"equals": data} if isinstance(data, str | int | float | bool) else data

    @field_validator("matches", "not_matches")
    @classmethod
    def _is_regular(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return value

    @property
    def asked(self) -> dict[str, Any]:
        """The conditions that are given."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class SourceSpec(Section):
    """One of several sources of training rows: a file, a folder of them, a shipped set or a data set on the hub.

    ``weight`` is how often its rows are drawn beside the others'; ``columns``, ``format``, ``field``, ``filter`` and
    ``limit`` are its own, those of the `data` section otherwise. ``name`` (of a subset), ``split`` and ``revision``
    choose among what the hub has.
    """

    path: str
    weight: float | None = Field(default=None, gt=0.0)
    format: Format | None = None
    field: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    filter: dict[str, Condition] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    name: str | None = None
    split: str | None = None
    revision: str | None = None


def _form(value: Any) -> str:
    return "path" if isinstance(value, str) else "sources"


Sources = Annotated[
    Annotated[str, Tag("path")] | Annotated[list[SourceSpec], Tag("sources"), Field(min_length=1)],
    Discriminator(_form),
]


class DataSpec(Section):
    """Where the rows are, which of them are taken and which columns are read.

    ``train`` is a path or a list of sources; without weights every row is taken once, with them rows are drawn until
    each source (``stopping_strategy: all_exhausted``) or one of them (``first_exhausted``) is used up.
    ``filter``, ``shuffle`` and ``limit`` act on training rows, in this order, source by source; ``split`` is the share
    of what is left that is held out as the test set where no test file is given. ``streaming`` reads rows while it
    trains, through a buffer of ``shuffle_buffer`` rows. ``workers`` processes make tokens of rows, which are kept for
    the next run unless ``cache`` is off.

    ``columns`` names the column of anything the task reads (`columns: {source: en, target: de}`), `translation.en`
    one inside an object.
    ``tokens`` and ``labels`` are column names, or column numbers from 0 (-1 is the last) in a CoNLL file. ``field`` is
    where in a JSON file the list of rows is.
    """

    train: Sources
    test: str | None = None
    validation: str | None = None
    format: Format | None = None
    field: str | None = None
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    tokens: str | int | None = None
    labels: str | int | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    filter: dict[str, Condition] = Field(default_factory=dict)
    shuffle: bool = False
    limit: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=1024, ge=2)
    split: float | None = Field(default=None, gt=0.0, lt=1.0)
    label_all_subwords: bool = False
    workers: int = Field(default=1, ge=1)
    streaming: bool = False
    shuffle_buffer: int = Field(default=1000, ge=1)
    cache: bool = True

    _direction: tuple[str, str] | None = PrivateAttr(default=None)

    @field_validator("train", mode="before")
    @classmethod
    def _list_of_sources(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = [value]
        return [{"path": item} if isinstance(item, str) else item for item in value] if _listed(value) else value

    @property
    def direction(self) -> tuple[str, str] | None:
        """(source, target) language that the recipe's base or prefix says, if any does."""
        return self._direction

    @property
    def names(self) -> list[str]:
        """The paths of the training rows."""
        return [self.train] if isinstance(self.train, str) else [source.path for source in self.train]


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
