"""What a console can show: a bar that is drawn over itself, or lines that stay."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["lines_to", "redraws"]


def redraws(console: Console) -> bool:
    """Whether what was drawn can be drawn over: a terminal. Not a notebook's cell, which shows a command's output as it
    comes, nor a file or a pipe whose reader takes colours (`FORCE_COLOR`, which builds and notebooks set).
    """
    if not console.is_terminal or console.is_dumb_terminal or "JPY_PARENT_PID" in os.environ:
        return False
    return "FORCE_COLOR" not in os.environ or console.file.isatty()


def lines_to(console: Console) -> Console:
    """The console for plain lines: in a notebook's own process, where rich would make a block of HTML of each, one that
    writes text.
    """
    from rich.console import Console

    return Console(file=sys.stdout, force_jupyter=False, force_terminal=False) if console.is_jupyter else console
