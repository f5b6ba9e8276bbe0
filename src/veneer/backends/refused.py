"""Packed linear layers that no backend here reads: each is refused by name, with the reason and the way out.

Some of them are subclasses of nn.Linear, whose weight is then not the numbers that the layer multiplies by.
"""

from __future__ import annotations

from functools import cache

from torch import nn

__all__ = ["why_not"]

ORIGINAL = "load the original model, and quantise it in a way that is known here (nf4, int8, hqq: docs/quantised.md)"
FLOATS = "load it as floats: quantization_config={}"

COMPRESSED = (
    "compressed-tensors has not decompressed its weight yet; load the model with "
    "quantization_config=CompressedTensorsConfig(dequantize=True), or call it once before the adapter is added"
)

#: the module of a class begins with -> (what it is, what to do)
KINDS = {
    "gptqmodel.": ("GPTQ or AWQ (gptqmodel)", ORIGINAL),
    "auto_gptq.": ("GPTQ (auto-gptq)", ORIGINAL),
    "awq.": ("AWQ (autoawq)", ORIGINAL),
    "aqlm.": ("AQLM", ORIGINAL),
    "vptq.": ("VPTQ", ORIGINAL),
    "spqr_quant.": ("SpQR", ORIGINAL),
    "optimum.quanto.": ("quanto", ORIGINAL),
    "compressed_tensors.": ("compressed-tensors", FLOATS.format("CompressedTensorsConfig(dequantize=True)")),
    "transformers.integrations.eetq": ("EETQ", ORIGINAL),
    "transformers.integrations.bitnet": ("BitNet", ORIGINAL),
    "transformers.integrations.higgs": ("HIGGS", ORIGINAL),
    "transformers.integrations.nvfp4": ("NVFP4", ORIGINAL),
    "transformers.integrations.mxfp4": ("MXFP4", FLOATS.format("Mxfp4Config(dequantize=True)")),
    "transformers.integrations.metal_quantization": ("Metal", ORIGINAL),
    "transformers.integrations.gemma_quant": ("Gemma's quantised weights", ORIGINAL),
    "transformers.integrations.fbgemm_fp8": ("FP8 (FBGEMM)", ORIGINAL),
    "transformers.integrations.finegrained_fp8": (
        "FP8 in blocks", FLOATS.format("FineGrainedFP8Config(dequantize=True)")
    ),
    "transformers.integrations.compressed_tensors": (
        "compressed-tensors", FLOATS.format("CompressedTensorsConfig(dequantize=True)")
    ),
}  # fmt: skip


@cache
def _kind(where: str) -> tuple[str, str] | None:
    """By the module of a class."""
    return next((found for prefix, found in KINDS.items() if f"{where}.".startswith(prefix)), None)


def _is_compressed(module: nn.Module) -> bool:
    """compressed-tensors marks ordinary layers, whose weight it puts back at the model's first call."""
    status = module.__dict__.get("quantization_status")
    return status is not None and status.value == "compressed"


def why_not(module: nn.Module) -> str | None:
    """Why a packed layer cannot take an adapter, and what to do; None for every other module."""
    if type(module).__module__.startswith("torch.nn."):
        return COMPRESSED if _is_compressed(module) else None
    found = _kind(type(module).__module__) if not list(module.children()) else None
    if found is None:
        return None
    what, remedy = found
    return f"its weight is packed as {what}, which veneer has no backend for; {remedy}"
