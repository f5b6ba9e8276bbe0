"""GGUF's names and layouts for Llama and its kin: which tensor is called what, and whose rows are reordered."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import AdapterError, MissingExtra

__all__ = ["ARCHITECTURES", "Names", "encoded", "gguf_library"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type of transformers -> general.architecture."""

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def gguf_library() -> Any:
    """The gguf package. Raises MissingExtra without it."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("GGUF files need the gguf package: pip install 'veneer[gguf]'") from error
    return gguf


class Names:
    """config: a transformers config. Raises AdapterError for an architecture that is not here."""

    def __init__(self, config: Any):
        library = gguf_library()
        kind = getattr(config, "model_type", None)
        if kind not in ARCHITECTURES:
            raise AdapterError(f"GGUF is written for {', '.join(ARCHITECTURES)}; this is a {kind} model")
        self.config, self.architecture = config, ARCHITECTURES[kind]
        arch = next(a for a, name in library.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self.table = library.get_tensor_name_map(arch, config.num_hidden_layers)

    def name(self, path: str) -> str:
        """model.layers.0.self_attn.q_proj -> blk.0.attn_q. Raises AdapterError for a layer that GGUF has no name
        for."""
        found = self.table.get_name(path)
        if found is None:
            raise AdapterError(f"{path}: GGUF has no name for this layer of a {self.architecture} model")
        return str(found)

    def rows(self, path: str, t: Tensor) -> Tensor:
        """A weight or bias (out, ...) with its rows as llama.cpp wants them: for the architecture `llama`, a query or
        key head's two rotary halves are interleaved."""
        if self.architecture != "llama" or not path.endswith(("q_proj", "k_proj")):
            return t
        heads = self.config.num_attention_heads if path.endswith("q_proj") else self.config.num_key_value_heads
        size = t.shape[0] // heads
        return t.reshape(heads, 2, size // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def encoded(t: Tensor, dtype: str) -> tuple[Any, Any]:
    """(array, its GGUF type): matrices in the type asked for, where its blocks fit a row; vectors in float32."""
    library = gguf_library()
    if dtype not in TYPES:
        raise AdapterError(f"dtype {dtype!r} is not one of {', '.join(TYPES)}")
    kind = library.GGMLQuantizationType[TYPES[dtype]]
    if t.dim() < 2:
        kind = library.GGMLQuantizationType.F32
    elif t.shape[-1] % library.GGML_QUANT_SIZES[kind][0]:
        kind = library.GGMLQuantizationType.F16
    return library.quants.quantize(t.detach().float().cpu().contiguous().numpy(), kind), kind
