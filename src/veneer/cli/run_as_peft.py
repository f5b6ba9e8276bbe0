"""`veneer run-as-peft`: an unmodified peft script, on veneer."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "run-as-peft"


def run_as_peft(
    arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGUMENTS...]", help="The script and its own.")],
) -> None:
    """Run a script with veneer answering to `import peft`, whether or not peft is installed."""
    from veneer.compat.run import run_as_peft as run

    run(arguments)
