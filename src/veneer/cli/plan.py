"""`veneer plan`: everything that can be known of a run before a weight is loaded or a step is taken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.options import with_flags
from veneer.cli.shared import Overrides

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from veneer.train.outlook import Outlook, Stream

__all__ = ["as_json", "plan", "show_plan"]

EXAMPLE = "veneer plan --base smollm2-135m-instruct --task causal-lm --data mine.jsonl"
LONGEST = 400
"""Tokens of an example that are shown."""


@with_flags
def plan(
    flags: dict[str, Any],
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML). Flags win over it.")] = None,
    overrides: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Show what `veneer train` would do with the same recipe and flags: nothing is trained or written."""
    if recipe is None and not flags and not overrides:
        raise UserError("nothing to plan", hint=f"Give a recipe, or flags:\n  {EXAMPLE}")
    from rich.console import Console

    from veneer.cli.quiet import quiet_libraries
    from veneer.train import processes
    from veneer.train.outlook import outlook
    from veneer.train.recipe import load_recipe

    quiet_libraries()
    loaded = load_recipe(recipe, overrides or [], **flags)
    found = outlook(loaded)
    processes.end()
    if not processes.is_main():
        return
    if json_:
        import json

        typer.echo(json.dumps(as_json(found), indent=2, ensure_ascii=False))
    else:
        show_plan(Console(), found)


def as_json(found: Outlook) -> dict[str, Any]:
    """The outlook as plain values."""
    import dataclasses

    plain = dataclasses.asdict(found)
    plain["estimate"] |= {"memory": found.estimate.memory, "seconds": found.estimate.seconds}
    return plain


def show_plan(console: Console, found: Outlook) -> None:
    """Print it: the model, the rows, the estimates, two rows as tokens, warnings."""
    from rich.text import Text

    for table in (_model(found), _rows(found), _needs(found)):
        console.print(table)
    console.print(_histogram(found))
    coloured = console.color_system is not None
    how = "green and underlined" if coloured else "between « and »"
    for number, stream in enumerate(found.examples, 1):
        console.print(Text.assemble((f"Example {number}", "bold"), f"  (what is learned is {how})"))
        console.print(tokens_as_text(stream, coloured), soft_wrap=True)
    for text in found.notes:
        console.print(Text(text, style="dim"))
    for text in found.warnings:
        console.print(Text.assemble(("Warning: ", "bold yellow"), text))
    if not found.warnings:
        console.print("Nothing odd was found in the rows.", style="green")


def tokens_as_text(stream: Stream, coloured: bool = True) -> Any:
    """Tokens one after another, every other one shaded, the learned ones coloured or, without colours, marked."""
    from rich.text import Text

    text, before = Text(), False
    for number, (token, learned) in enumerate([*stream[:LONGEST], ("", False)]):
        if not coloured and learned != before:
            text.append("«" if learned else "»")
        before = learned
        shade = "on grey15" if number % 2 else ""
        text.append(token, style=f"{'bold green underline' if learned else 'dim'} {shade}".strip())
    if len(stream) > LONGEST:
        text.append(f" … {len(stream) - LONGEST} more tokens", style="italic")
    return text


def _table(title: str, *rows: tuple[str, str]) -> RenderableType:
    from rich.table import Table

    table = Table(title=title, title_style="bold", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _model(found: Outlook) -> RenderableType:
    from veneer.cli.show import human_size

    m = found.matches
    layers = ", ".join(f"{name} x {number}" for name, number in m.layers.items()) or "none (the whole model)"
    rows = [("adapted layers", layers)]
    if m.unmatched:
        rows.append(("matched nothing", ", ".join(m.unmatched)))
    rows.append(("parameters", f"{m.trained:,} of {m.total:,} train ({m.trained / m.total:.3%})"))
    rows.append(("adapter file", human_size(found.estimate.disk)))
    return _table("Model", *rows)


def _rows(found: Outlook) -> RenderableType:
    r, e = found.rows, found.estimate
    return _table(
        "Rows",
        ("rows", f"{r.number:,} to train on, {r.test:,} to test on"),
        ("tokens", f"{r.tokens:,}; the middle row has {r.middle:,}, the longest {r.longest:,}"),
        ("learned", f"{r.learned:.1%} of the tokens have a label"),
        ("padding", f"{r.padding:.1%} of what the model computes"),
        ("steps", f"{e.steps:,}"),
    )


def _needs(found: Outlook) -> RenderableType:
    from veneer.cli.show import human_size
    from veneer.train.progress import clock

    e = found.estimate
    rows, tokens = e.largest
    memory = (
        f"about {human_size(e.memory)} to train, beside {human_size(found.base)} of Python and its libraries: weights "
        f"{human_size(e.weights)}, gradients and optimizer {human_size(e.states)}, a step of {rows} x {tokens} tokens "
        f"{human_size(e.step)} (counted by running it on tensors without data)"
    )
    seconds = (
        f"about {clock(e.seconds)} to train, {e.seconds_a_step:.2g} s a step: {e.need.flops / 1e9:,.0f} GFLOP of "
        f"matrix products and {e.need.moved / 1e9:.1f} GB moved for {e.usual[0]} x {e.usual[1]} tokens, at the "
        f"{e.speed.flops / 1e9:,.0f} GFLOP/s and {e.speed.bytes / 1e9:.1f} GB/s that this machine just did"
    )
    return _table("Estimates", ("memory", memory), ("time", seconds))


def _histogram(found: Outlook) -> RenderableType:
    most = max(number for _, number in found.rows.histogram)
    bars = [
        (
            f"{first:,} to {last:,}" if last > first else f"{first:,}",
            f"{'█' * max(1 if number else 0, round(40 * number / most))} {number:,}",
        )
        for (first, last), number in found.rows.histogram
    ]
    return _table("Length of rows, in tokens", *bars)
