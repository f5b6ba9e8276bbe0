"""`veneer check`: will another server load this adapter, and answer as it was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag, UserError

__all__ = ["check"]

MARKS = {"error": ("✗", "red"), "wrong": ("✗", "red"), "note": ("·", "yellow")}


def check(
    adapter: Annotated[
        str, typer.Argument(help="An adapter's folder, a run's folder, or a hub id; for tensorrt an exported folder.")
    ],
    server: Annotated[str, typer.Option("--for", help="vllm, sglang, or tensorrt for ONNX graphs.")] = "vllm",
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write an equal adapter of one rank and scaling into this new folder.")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Check an adapter against another server's rules, or ONNX graphs against TensorRT's operators; say what to change.
    Exit code 1 where it cannot be served."""
    from rich.console import Console

    from veneer.cli.quiet import quiet_libraries
    from veneer.export.serving_rules import check_adapter, plain_copy
    from veneer.export.tensorrt import check_graphs

    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True)
    if server == "tensorrt" and fix is not None:
        raise UserError("graphs cannot be mended here", where="--fix", hint="Export them again.")
    found = check_graphs(adapter) if server == "tensorrt" else check_adapter(adapter, server)
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
    good = "TensorRT has every operator of it" if server == "tensorrt" else f"{server} can serve it (rank {found.rank})"
    console.print(f"{good}:\n    {found.flags}", markup=False)
