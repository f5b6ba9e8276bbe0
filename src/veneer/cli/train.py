"""`veneer train`: a recipe, or flags, to a trained, measured and inspected adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.options import with_flags
from veneer.cli.shared import Overrides

__all__ = ["train"]

EXAMPLE = "veneer train --base smollm2-135m-instruct --task causal-lm --data mine.jsonl --split 0.1 --out runs/mine"


@with_flags
def train(
    flags: dict[str, Any],
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML). Flags win over it.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the full recipe, stop.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Train an adapter from a recipe, or from flags alone."""
    if recipe is None and not flags and not overrides:
        raise UserError("nothing to train on", hint=f"Give a recipe, or flags:\n  {EXAMPLE}")
    from rich.console import Console

    from veneer.train.recipe import load_recipe

    console = Console()
    loaded = load_recipe(recipe, overrides or [], **flags)
    if dry_run:
        print_recipe(console, loaded)
        return
    from veneer.cli.session import run_and_show

    run_and_show(loaded, console)


def print_recipe(console: Any, recipe: Any) -> None:
    """The resolved recipe as YAML; coloured in a terminal, plain text in a pipe that can be saved and run."""
    if console.is_terminal:
        from rich.syntax import Syntax

        console.print(Syntax(recipe.dump(), "yaml", background_color="default"))
    else:
        typer.echo(recipe.dump(), nl=False)
