"""`veneer quickstart`: the shipped recipe, data and base model, from nothing to a tuned model."""

from __future__ import annotations

from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag
from veneer.cli.shared import Overrides

__all__ = ["quickstart"]


class Task(str, Enum):
    orders = "orders"
    ner = "ner"


ABOUT = {
    Task.orders: "free-text shop orders into strict JSON",
    Task.ner: "tagging the entities in support tickets",
}


def free_folder(name: str) -> str:
    """``name``, or ``name-2``, ``name-3`` ... : the first that does not exist."""
    path, number = Path(name), 1
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return str(path)


def shipped(*parts: str) -> Path:
    """A file inside the installed package."""
    return Path(str(files("veneer").joinpath(*parts)))


def quickstart(
    task: Annotated[Task, typer.Option("--task", help="What to teach the model.")] = Task.orders,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder to write.", show_default="veneer-quickstart-TASK")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="One pass and a smaller test: a taste, not a result.")] = False,
    overrides: Overrides = None,
    debug: DebugFlag = False,
) -> None:
    """Fine-tune a small bundled model on a shipped data set, and see what it learned."""
    from rich.console import Console

    from veneer.cli.session import run_and_show
    from veneer.train.recipe import load_recipe

    console = Console()
    overrides = list(overrides or [])
    if fast:
        overrides = ["train.num_train_epochs=1", "eval.limit=24", *overrides]
    folder = out or free_folder(f"veneer-quickstart-{task.value}")
    recipe = load_recipe(shipped("recipes", f"quickstart_{task.value}.yaml"), overrides, out=folder)
    console.print(f"[bold]veneer quickstart[/bold]: teaching {recipe.base.name} {ABOUT[task]}\n")
    run_and_show(recipe, console, example_rows=20)
