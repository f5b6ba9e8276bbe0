"""`veneer methods`: what can be trained, one line a method, or one method's page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.errors import DebugFlag

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's page, such as lora.")] = None,
    debug: DebugFlag = False,
) -> None:
    """List the methods, or show one with its formula, fields and an example."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of methods that read the weights
    from rich.console import Console

    console = Console()
    if name is None:
        _list(console)
    else:
        _show(console, name)


def _list(console: Console) -> None:
    from rich.progress import track
    from rich.table import Table

    from veneer import registry
    from veneer.docs.facts import facts
    from veneer.docs.pages import yes

    table = Table(title="Methods", title_style="bold", title_justify="left")
    for column in ("name", "in one line", "layers", "merges", "mixed batches"):
        table.add_column(column, overflow="fold")
    names = list(registry.METHODS)
    for name in track(names, "trying each on small layers", console=console, transient=True):
        f = facts(name)
        layers = ", ".join(f.layers) or "whole model"
        table.add_row(name.lower(), f.summary, layers, yes(bool(f.merges)), yes(f.mixed))
    console.print(table)
    console.print("veneer methods NAME shows a method's page.", style="dim", highlight=False)


def _show(console: Console, name: str) -> None:
    from veneer import registry
    from veneer.docs.facts import facts
    from veneer.docs.pages import NOTE, page

    registry.method(name)  # raises with the known names
    text = page(facts(name.upper())).removeprefix(NOTE).lstrip()
    if not console.is_terminal:
        typer.echo(text)
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))
