"""The `veneer` command itself: it knows the commands' names and options, and imports nothing heavy."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from veneer.cli.arithmetic import combine, convert, extract, resize
from veneer.cli.chat import chat
from veneer.cli.check import check
from veneer.cli.compare import compare
from veneer.cli.errors import DebugFlag, friendly_errors
from veneer.cli.evaluate import evaluate
from veneer.cli.export import export
from veneer.cli.generate import generate
from veneer.cli.inspect import diff, inspect
from veneer.cli.merge import merge
from veneer.cli.methods import methods
from veneer.cli.plan import plan
from veneer.cli.predict import predict
from veneer.cli.publish import pull, push
from veneer.cli.quickstart import quickstart
from veneer.cli.run_as_peft import NAME, run_as_peft
from veneer.cli.serve import serve
from veneer.cli.train import train
from veneer.train.allocator import large_pages
from veneer.version import __version__

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Shows expected errors as a panel, whoever runs the command."""

    def invoke(self, ctx: Any) -> Any:
        with friendly_errors(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    name="veneer",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on your own data with one command.",
    epilog="Start here: [bold]veneer quickstart[/bold]. Then: veneer COMMAND --help.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"veneer {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: DebugFlag = False,
) -> None:
    """Fine-tune a language model on your own data with one command."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would fill a log file
    large_pages()


for command in (
    quickstart,
    plan,
    train,
    compare,
    chat,
    generate,
    predict,
    merge,
    methods,
    inspect,
    diff,
    combine,
    resize,
    convert,
    extract,
    export,
    check,
    push,
    pull,
    serve,
):
    app.command()(command)
app.command("eval")(evaluate)


app.command(NAME, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run_as_peft)


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == [NAME] and sys.argv[2:3] not in ([], ["--help"]):
        from veneer.compat.run import run_as_peft as run

        run(sys.argv[2:])  # errors are the script's own, so no panel stands around them
    else:
        app()


if __name__ == "__main__":
    main()
