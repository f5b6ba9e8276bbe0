"""`veneer merge`: base and adapter into one ordinary model folder, checked before it is kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.quiet import quiet_libraries
from veneer.cli.shared import BaseOption

__all__ = ["merge"]

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2, "float16": 8e-3}
"""Largest allowed difference of a logit, as a share of the largest logit: rounding, with room."""


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a run's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist yet.")],
    base: BaseOption = None,
    safe: Annotated[bool, typer.Option("--safe", help="Refuse to merge weights that are not finite.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Store as float32, bfloat16 or float16.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Merge an adapter into its base and write a model folder that loads without veneer."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}", hint="Leave it out to keep the base's.")
    if out.exists():
        raise UserError("already exists", where=str(out), hint="Name a folder that does not exist yet.")
    from veneer.train.use import find_adapter, load

    if find_adapter(adapter) is None:
        hint = "Give the folder that holds adapter_config.json."
        raise UserError("there is no adapter here", where=adapter, hint=hint)
    quiet_libraries()
    loaded = load(adapter, base=base)
    import torch

    batch = _probe(loaded)
    with torch.inference_mode():
        before = loaded.model(**batch).logits.float()
    merged = loaded.model.merge_and_unload(safe_merge=safe)
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        difference, share, agree = _compare(type(merged), partial, batch, before)
        kind = dtype or str(merged.dtype).removeprefix("torch.")
        if not share <= TOLERANCE.get(kind, 1e-3):
            problem = f"the merged logits differ from base + adapter by {difference:.3g} ({100 * share:.2g} %)"
            raise UserError(problem, where=str(out), hint="Nothing was written. Try --dtype float32, or --safe.")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    typer.echo(f"merged model in {out} ({kind})")
    typer.echo(f"largest logit difference to base + adapter: {difference:.3g}; same top token: {100 * agree:.1f} %")


def _probe(loaded: Any) -> dict[str, Any]:
    """A few lines of text as a batch, for comparing outputs."""
    text = "The quick brown fox jumps over the lazy dog. 12 apples, 3.50 EUR, by 14 March: ok?"
    return dict(loaded.tokenizer(text, return_tensors="pt").to(loaded.model.device))


def _compare(kind: type, folder: Path, batch: dict[str, Any], before: Any) -> tuple[float, float, float]:
    """Read the folder back; the largest logit difference, its share of the largest logit, top-1 agreement."""
    import torch

    again: Any = kind
    model = again.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    with torch.inference_mode():
        after = model(**{k: v.to(model.device) for k, v in batch.items()}).logits.float().to(before.device)
    difference = float((after - before).abs().max())
    agree = float((after.argmax(-1) == before.argmax(-1)).float().mean())
    return difference, difference / max(float(before.abs().max()), 1e-12), agree
