"""The errors a user can meet. They subclass the built-in classes that peft raises, so `except` clauses keep working."""

from __future__ import annotations


class PeftError(Exception):
    """What errors of adapters have in common."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A pattern, or all of them together, leaves nothing to adapt."""


class AdapterError(ValueError):
    """Settings, names or tensors that do not fit; the message says what, where and what to do."""


class CannotConvert(AdapterError, TypeError):
    """This adapter cannot become a LoRA; the message says why."""


class CannotMerge(NotImplementedError):
    """This adapter has no merged weight on this layer; the message says why."""


class LoadError(RuntimeError):
    """A checkpoint does not fit the model. `report` lists every tensor that is missing, unexpected or mis-shaped."""

    def __init__(self, message: str, report: dict[str, list[str]] | None = None):
        super().__init__(message)
        self.report = report or {}


class MissingExtra(ImportError):
    """An optional dependency is absent; the message names the pip command."""


class PeftWarning(UserWarning):
    """Anything veneer does that the user may not expect."""
