"""`veneer merge`: base and adapter into one ordinary model folder, checked before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.shared import BaseOption

__all__ = ["merge"]

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2, "float16": 8e-3}
"""Difference of a logit, as a share of the largest logit, that is plain rounding; above it the adapter's own effect is
the measure (see merge_to_folder)."""


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a run's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist yet.")],
    base: BaseOption = None,
    safe: Annotated[bool, typer.Option("--safe", help="Refuse to merge weights that are not finite.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Store as float32, bfloat16 or float16.")] = None,
    sample: Annotated[Path | None, typer.Option("--sample", help="Text to check on, one sample a line.")] = None,
    shards: Annotated[bool, typer.Option("--progress", help="Print each file as it is written.")] = False,
    into: Annotated[
        str | None,
        typer.Option(
            "--merge-into", help="`original`: the base's own weights; nf4, int8 ...: the base quantised in this way."
        ),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Merge an adapter into its base and write a model folder that loads without veneer."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}", hint="Leave it out to keep the base's.")
    if out.exists():
        raise UserError("already exists", where=str(out), hint="Name a folder that does not exist yet.")
    from veneer.cli.quiet import quiet_libraries
    from veneer.export.merging import merge_to_folder

    quiet_libraries()
    texts = _texts(sample)

    def told(shard: str, kept: bool) -> None:
        typer.echo(f"{shard}: {'already there' if kept else 'written'}")

    show = told if shards else None
    done = merge_to_folder(
        adapter, out, base, dtype=dtype, safe=safe, tolerance=TOLERANCE, samples=texts, on_shard=show, into=into
    )  # fmt: skip
    typer.echo(f"merged model in {out} ({done.certificate.dtype})")
    if not done.streamed:
        typer.echo(f"the base was loaded whole: {done.why}")
    if done.loss:
        typer.echo(f"{done.loss}; by layer in merge_errors.json")
    for line in done.certificate.lines():
        typer.echo(line)


def _texts(sample: Path | None) -> tuple[str, ...]:
    from veneer.export.certificate import SAMPLES

    if sample is None:
        return SAMPLES
    try:
        lines = [line for line in sample.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(error), where=str(sample), hint="Give a text file, one sample a line.") from None
    if not lines:
        raise UserError("holds no text", where=str(sample), hint="Give a text file, one sample a line.")
    return tuple(lines[:64])
