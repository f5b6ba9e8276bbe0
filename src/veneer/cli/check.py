"""`veneer check`: will another server load this adapter, and answer as it was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag

__all__ = ["check"]

MARKS = {"error": ("✗", "red"), "wrong": ("✗", "red"), "note": ("·", "yellow")}


def check(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a run's folder, or a hub id.")],
    server: Annotated[str, typer.Option("--for", help="vllm or sglang.")] = "vllm",
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write an equal adapter of one rank and scaling into this new folder.")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Check an adapter against another server's rules; say what to change. Exit code 1 where it cannot be served."""
    from rich.console import Console

    from veneer.cli.quiet import quiet_libraries
    from veneer.export.serving_rules import check_adapter, plain_copy

    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True)
    found = check_adapter(adapter, server)
    if fix is not None:
        written = plain_copy(adapter, fix)
        console.print(f"an equal adapter of one rank is in {written}")
        found = check_adapter(str(written), server)
    for finding in found.findings:
        mark, style = MARKS[finding.level]
        more = "it would load and answer wrongly: " if finding.level == "wrong" else ""
        console.print(f"{mark} {more}{finding.problem}", style=style, markup=False)
        console.print(f"    {finding.remedy}", markup=False)
    if not found.good:
        raise typer.Exit(1)
    console.print(f"{server} can serve it (rank {found.rank}):\n    {found.flags}", markup=False)
