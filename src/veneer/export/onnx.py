"""ONNX of a merged encoder: sequence and token classification, or hidden states; checked in onnxruntime.

Inputs "input_ids" and "attention_mask" (batch, tokens), int64; output "logits" or "last_hidden_state", float32.
Batch and tokens are free.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, MissingExtra

__all__ = ["TOLERANCE", "OnnxExport", "export_onnx"]

TOLERANCE = 1e-4
"""Largest difference to torch that is accepted, over the largest output."""
INPUTS = ("input_ids", "attention_mask")
SHAPES = ((1, 3), (3, 16), (2, 7))


@dataclass(frozen=True)
class OnnxExport:
    """largest_difference: between onnxruntime and torch, over several batches, lengths and paddings."""

    folder: Path
    output: str
    largest_difference: float
    size: int


class _Graph(nn.Module):
    """The model with its inputs by position and one output."""

    def __init__(self, model: Any, output: str):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]


def _libraries() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("ONNX export needs onnx, onnxruntime, onnxscript: pip install 'veneer[onnx]'") from error
    return onnxruntime


def export_onnx(model: Any, folder: str | Path, tokenizer: Any = None) -> OnnxExport:
    """Write `model.onnx`, the config and the tokenizer into a new folder, and compare with torch.

    model: a plain transformers encoder, adapters merged (merge_and_unload). Raises AdapterError for a model with
    adapters in it, for decoders, where the folder exists, and where onnxruntime's outputs differ by more than
    TOLERANCE of the largest; nothing is left then.
    """
    runtime, path = _libraries(), Path(folder)
    if path.exists():
        raise AdapterError(f"{path} already exists; name a folder that does not exist yet")
    _check_kind(model)
    model = model.float().cpu().eval()
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        output = _write(model, partial / "model.onnx")
        difference = _compare(runtime, model, partial / "model.onnx", output)
        model.config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        size = sum(p.stat().st_size for p in partial.glob("model.onnx*"))
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return OnnxExport(path, output, difference, size)


def _check_kind(model: Any) -> None:
    name = type(model).__name__
    if any(getattr(m, "is_adapter_wrapper", False) for m in model.modules()):
        raise AdapterError(f"{name} has adapters in it; call merge_and_unload() first")
    config = getattr(model, "config", None)
    if config is None:
        raise AdapterError(f"{name} is not a transformers model")
    if getattr(config, "is_encoder_decoder", False) or (getattr(model, "can_generate", lambda: False)()):
        raise AdapterError(f"{name} generates text; only encoders are exported to ONNX")


def _sample(vocabulary: int, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask that pads the first row where there is more than one."""
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if shape[0] > 1:
        mask[0, shape[1] // 2 :] = 0
    return ids, mask


@torch.no_grad()
def _write(model: Any, path: Path) -> str:
    from torch.export import Dim

    ids, mask = _sample(model.config.vocab_size, (2, 8), 0)
    found = model(input_ids=ids, attention_mask=mask)
    output = "logits" if found.get("logits") is not None else "last_hidden_state"
    free = {0: Dim("batch"), 1: Dim("tokens")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            _Graph(model, output).eval(),
            (ids, mask),
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS),
            output_names=[output],
            dynamic_shapes={name: dict(free) for name in INPUTS},
        )
    program.save(str(path))
    return output


@torch.no_grad()
def _compare(runtime: Any, model: Any, path: Path, output: str) -> float:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for seed, shape in enumerate(SHAPES, 1):
        ids, mask = _sample(model.config.vocab_size, shape, seed)
        want = model(input_ids=ids, attention_mask=mask)[output]
        (got,) = session.run([output], dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))
        gap = float((torch.from_numpy(got) - want).abs().max())
        if not gap <= TOLERANCE * max(float(want.abs().max()), 1e-12):
            raise AdapterError(
                f"onnxruntime differs from torch by {gap:.3g} on a batch of {shape}; nothing was written"
            )
        worst = max(worst, gap)
    return worst
