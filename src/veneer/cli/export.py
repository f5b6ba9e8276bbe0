"""`veneer export`: a model or an adapter in another program's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.shared import BaseOption

__all__ = ["export"]

FORMS = {
    "onnx": "merged, as ONNX graphs",
    "onnx-lora": "one ONNX graph of the base, A and B of each layer as inputs",
    "gguf": "merged, as one .gguf file (Llama and its kin)",
    "gguf-lora": "the LoRA alone, as a .gguf file for llama.cpp's --lora",
}


def export(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a run's folder, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder or .gguf file to write; it must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help="; ".join(f"{k}: {v}" for k, v in FORMS.items()) + ".")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="onnx: 8-bit graphs too, and what they lose.")] = False,
    samples: Annotated[Path | None, typer.Option(help="Text file: what int8 loses is measured on its lines.")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=PATH", help="onnx-lora: another adapter.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="gguf: float32, float16, bfloat16 or q8_0.")] = "float16",
    base: BaseOption = None,
    debug: DebugFlag = False,
) -> None:
    """Write a merged model, or an adapter, for another program, checked against torch."""
    if to not in FORMS:
        raise UserError(f"{to!r} is not one of {', '.join(FORMS)}", where="--to", hint="Merged folders: veneer merge.")
    from veneer.cli.quiet import quiet_libraries

    quiet_libraries()
    if to == "gguf-lora":
        _gguf_lora(adapter, out, base, dtype)
        return
    from veneer.export.merging import _tokenizer
    from veneer.opened import open_adapter

    opened = open_adapter(adapter, base, need_base=True)
    tokenizer = _tokenizer(opened.folder, None, opened.base_name)
    if to == "onnx-lora":
        _onnx_lora(opened, more or [], out, tokenizer)
    elif to == "gguf":
        from veneer.export.gguf_model import export_gguf

        made = export_gguf(opened.model.merge_and_unload(), out, tokenizer, dtype=dtype)
        typer.echo(f"{made.path}: {made.tensors} tensors, {made.size / 1e6:.1f} MB ({dtype})")
    else:
        _onnx(opened, out, tokenizer, int8, samples)


def _onnx(opened: Any, out: Path, tokenizer: Any, int8: bool, samples: Path | None) -> None:
    from veneer.export.onnx import export_onnx

    lines = [line for line in samples.read_text(encoding="utf-8").splitlines() if line.strip()] if samples else []
    done = export_onnx(opened.model.merge_and_unload(), out, tokenizer, int8=int8, samples=lines)
    typer.echo(f"{done.folder}: {', '.join(done.files)}, {done.size / 1e6:.1f} MB, output {done.output!r}")
    typer.echo(f"largest difference between onnxruntime and torch: {done.largest_difference:.2g}")
    if done.int8 is not None:
        typer.echo("int8, against the graph of full precision:")
        for line in done.int8.lines("the full graph"):
            typer.echo(f"  {line}")


def _onnx_lora(opened: Any, more: list[str], out: Path, tokenizer: Any) -> None:
    from veneer.cli.serve import named
    from veneer.export.onnx_adapters import export_with_factors

    own = opened.folder.resolve()
    first = own.parent.name if own.name == "adapter" else own.name
    adapters = {first: str(opened.folder), **named(more, "--with")}
    done = export_with_factors(opened.model.unload(), adapters, out, tokenizer)
    typer.echo(f"{done.folder}/model.onnx: A and B of {len(done.layers)} layers are inputs")
    for name, path in done.adapters.items():
        typer.echo(f"{name}: {path}")
    typer.echo(f"largest difference between onnxruntime and torch: {done.largest_difference:.2g}")


def _gguf_lora(adapter: str, out: Path, base: str | None, dtype: str) -> None:
    from veneer.export.gguf_lora import export_gguf_lora

    made = export_gguf_lora(adapter, out, base=base, dtype=dtype)
    typer.echo(f"{made.path}: {made.tensors} tensors, {made.size / 1e6:.1f} MB, alpha {made.alpha:g}")
