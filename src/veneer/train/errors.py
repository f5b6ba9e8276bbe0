"""The errors of `veneer train`: one class a user can catch, with the place, the reason and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike

__all__ = ["BaseModelError", "DataError", "RecipeError", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None where nothing is close."""
    options = {option.lower(): option for option in known}
    found = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.6)
    return options[found[0]] if found else None


class RecipeError(ValueError):
    """A training run that cannot start, or must stop, because of what it was given.

    ``problem`` says what is wrong, ``file`` and ``line`` where (``line`` counts from 1), ``key`` is the
    dotted name in the recipe, ``near`` the closest valid name and ``hint`` what to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | PathLike[str] | None = None,
        line: int | None = None,
        key: str | None = None,
        near: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem, self.key, self.near, self.hint = problem, key, near, hint
        self.file = None if file is None else str(file)
        self.line = line
        super().__init__(problem)

    @property
    def place(self) -> str:
        """``file:line``, ``file`` or an empty string."""
        if self.file is None:
            return ""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.place, self.key, self.problem) if part)
        if self.near:
            head += f". Did you mean `{self.near}`?"
        if self.hint:
            head += f"{'' if head.endswith(('.', '?')) else '.'} {self.hint}"
        return head


class DataError(RecipeError):
    """A data file that cannot be used as it is: the message names the file, line or row, and reason."""


class BaseModelError(RecipeError):
    """A base model that cannot be found or loaded."""
