"""ONNX of a merged model, checked in onnxruntime against torch; int8 beside it on request.

Encoders: "input_ids" and "attention_mask" (batch, tokens), int64; output "logits" or "last_hidden_state", float32.
Decoders: also "position_ids" and the cache, "past_key_values.0.key" ... in, "present.0.key" ... out, (batch, heads,
tokens before, head size); a prompt comes with a cache of length 0. Encoder-decoders: `encoder_model.onnx`, and
`decoder_model.onnx` with a cache over the target. Batch and lengths are free.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .certificate import Certificate
from .onnx_graph import TOLERANCE, compare_graph, libraries, write_graph
from .onnx_models import graphs_of

__all__ = ["TOLERANCE", "OnnxExport", "export_onnx"]


@dataclass(frozen=True)
class OnnxExport:
    """largest_difference: between onnxruntime and torch, over several batches, lengths and paddings. files: the
    graphs; size: bytes of all of them. int8: what quantising to 8 bits lost, where that was asked for."""

    folder: Path
    output: str
    largest_difference: float
    size: int
    files: tuple[str, ...] = ("model.onnx",)
    int8: Certificate | None = None


def export_onnx(
    model: Any, folder: str | Path, tokenizer: Any = None, *, int8: bool = False, samples: Sequence[str] = ()
) -> OnnxExport:
    """Write the model's graphs, its config and the tokenizer into a new folder, and compare with torch.

    model: a plain transformers model, adapters merged (merge_and_unload). int8: write 8-bit graphs beside, and measure
    on samples (texts; needs the tokenizer) what they lose. Raises AdapterError for a model with adapters in it, where
    the folder exists, and where onnxruntime's outputs differ by more than TOLERANCE of the largest; nothing is left
    then.
    """
    libraries()
    _check_kind(model)
    with new_folder(Path(folder)) as partial:
        model = model.float().cpu().eval()
        with eager(model):
            graphs = graphs_of(model)
            paths = [write_graph(graph, partial) for graph in graphs]
            difference = max(compare_graph(graph, path) for graph, path in zip(graphs, paths, strict=True))
        model.config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        lost = None
        if int8:
            from .onnx_int8 import quantise

            lost = quantise(graphs, paths, model, tokenizer, samples)
            lost.write(partial, "int8_certificate.json")
        files = tuple(sorted(p.name for p in partial.glob("*.onnx")))
        size = sum(p.stat().st_size for p in partial.glob("*.onnx*"))
    return OnnxExport(Path(folder), graphs[-1].outputs[0], difference, size, files, lost)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes it at the end; nothing is left after an error."""
    if path.exists():
        raise AdapterError(f"{path} already exists; name a folder that does not exist yet")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Plain attention inside: fused attention has no ONNX form for every mask."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _check_kind(model: Any) -> None:
    name = type(model).__name__
    if any(getattr(m, "is_adapter_wrapper", False) for m in model.modules()):
        raise AdapterError(f"{name} has adapters in it; call merge_and_unload() first")
    if getattr(model, "config", None) is None:
        raise AdapterError(f"{name} is not a transformers model")
