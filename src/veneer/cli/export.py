"""`veneer export`: the merged model in another program's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.shared import BaseOption

__all__ = ["export"]

FORMS = ("onnx",)


def export(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a run's folder, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help="onnx (encoders: classification, token labels).")] = "onnx",
    base: BaseOption = None,
    debug: DebugFlag = False,
) -> None:
    """Merge an adapter and write the model for another program, checked against torch."""
    if to not in FORMS:
        raise UserError(f"{to!r} is not one of {', '.join(FORMS)}", where="--to", hint="Merged folders: veneer merge.")
    from veneer.cli.quiet import quiet_libraries
    from veneer.export.merging import _tokenizer
    from veneer.export.onnx import export_onnx
    from veneer.opened import open_adapter

    quiet_libraries()
    opened = open_adapter(adapter, base, need_base=True)
    tokenizer = _tokenizer(opened.folder, None, opened.base_name)
    done = export_onnx(opened.model.merge_and_unload(), out, tokenizer)
    typer.echo(f"{done.folder}/model.onnx: {done.size / 1e6:.1f} MB, output {done.output!r}")
    typer.echo(f"largest difference between onnxruntime and torch: {done.largest_difference:.2g}")
