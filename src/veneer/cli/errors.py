"""What a person sees when something they gave cannot work: one panel, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

__all__ = ["DebugFlag", "UserError", "friendly_errors"]


OTHERS = 20.0
"""Seconds after which a process says itself what went wrong, for it did so nowhere else."""


DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file may not grow as large",
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "not allowed to read or write this",
    errno.EPERM: "not allowed to read or write this",
}
"""What a machine refuses to do with a file, and the program can do nothing about."""


class UserError(Exception):
    """A request that cannot be met: ``problem`` says what is wrong, ``where``, and ``hint`` what to do."""

    def __init__(self, problem: str, *, where: str = "", hint: str = "") -> None:
        self.problem, self.where, self.hint = problem, where, hint
        super().__init__(": ".join(part for part in (where, problem) if part))


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().meta["veneer.debug"] = True
    return value


DebugFlag = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the full traceback of an error.")]


def _expected() -> tuple[type[Exception], ...]:
    """The errors that are the user's to mend. Read only once one was raised, so that it costs no import."""
    from veneer.errors import AdapterError, CannotMerge, LoadError, MissingExtra
    from veneer.train.errors import RecipeError

    return (UserError, RecipeError, AdapterError, CannotMerge, LoadError, MissingExtra)


def _lines(error: Exception) -> tuple[str, str, str, str]:
    """(what, where, nearest valid name, what to do)."""
    if isinstance(error, OSError):
        hint = "Nothing half-written is left under the name asked for. Make room or choose another place; run it again."
        return DISK[error.errno or 0], str(error.filename or ""), "", hint
    if isinstance(error, UserError):
        return error.problem, error.where, "", error.hint
    from veneer.cli.options import as_typed

    parts = (as_typed(getattr(error, "place", "") or ""), getattr(error, "key", "") or "")
    place = " · ".join(part for part in parts if part)
    return (
        getattr(error, "problem", "") or str(error),
        place,
        getattr(error, "near", "") or "",
        getattr(error, "hint", "") or "",
    )


def show_error(error: Exception) -> None:
    """Print the panel on stderr; once where a launcher has started several processes that all meet the same.

    The others wait: the launcher ends them when the first has printed and is gone.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(OTHERS)
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    problem, where, near, hint = _lines(error)
    body = Text()
    if where:
        body.append(where + "\n", style="bold")
    body.append(problem)
    if near:
        body.append("\nDid you mean ").append(near, style="bold green").append("?")
    if hint:
        body.append("\n\n" + hint, style="cyan")
    Console(stderr=True).print(Panel(body, title="veneer cannot go on", title_align="left", border_style="red"))


@contextmanager
def friendly_errors(context: typer.Context) -> Iterator[None]:
    """Turn an expected error into a panel and exit code 2; with ``--debug`` let it through."""
    try:
        yield
    except _expected() as error:
        if context.find_root().meta.get("veneer.debug"):
            raise
        show_error(error)
        raise typer.Exit(2) from None
    except OSError as error:
        if error.errno not in DISK or context.find_root().meta.get("veneer.debug"):
            raise
        show_error(error)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None
