"""A LoRA alone as a .gguf file, as llama.cpp's --lora reads it.

general.type "adapter", adapter.type "lora", general.architecture that of the base, adapter.lora.alpha; for each layer
"<name>.weight.lora_a" (r, in) and "<name>.weight.lora_b" (out, r). What is added is alpha / r * B A; here B holds the
adapter's own scaling, and alpha is r.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .gguf_names import Names, encoded, gguf_library

__all__ = ["GgufFile", "export_gguf_lora"]


@dataclass(frozen=True)
class GgufFile:
    """size: bytes. alpha: of an adapter's file."""

    path: Path
    tensors: int
    size: int
    alpha: float = 0.0


def export_gguf_lora(
    adapter: str, path: str | Path, *, base: str | None = None, config: Any = None, dtype: str = "float32"
) -> GgufFile:
    """Write one adapter's A and B. config: the base's transformers config; without it, that of the base that the
    adapter names, or of `base`.

    Raises AdapterError for what llama.cpp would not read right: adapters that are not plain LoRA on linear layers,
    layers without a GGUF name, architectures other than ARCHITECTURES; and where the file exists.
    """
    from ..config import PeftConfig
    from ..opened import adapter_folder
    from ..train.bases import load_config, resolve_base
    from .onnx_adapters import factors_of

    out = Path(path)
    _check_path(out)
    factors = factors_of(adapter)
    if config is None:
        named = base or PeftConfig.from_pretrained(str(adapter_folder(adapter))).base_model_name_or_path
        if not named:
            raise AdapterError(f"{adapter} does not name its base model; give it with --base")
        config = load_config(resolve_base(str(named)))
    names = Names(config)
    alpha = float(Counter(A.shape[0] for A, _ in factors.values()).most_common(1)[0][0])  # B holds the scaling
    tensors = []
    for layer, (A, B) in factors.items():
        name = f"{names.name(layer)}.weight"
        tensors.append((f"{name}.lora_a", A))
        tensors.append((f"{name}.lora_b", names.rows(layer, B * (A.shape[0] / alpha))))  # alpha / r is llama.cpp's
    return write_gguf(out, names.architecture, _settings(alpha), tensors, dtype, alpha)


def _check_path(path: Path) -> None:
    if path.suffix.lower() != ".gguf":
        raise AdapterError(f"{path}: name a file that ends in .gguf")
    if path.exists():
        raise AdapterError(f"{path} already exists; name a file that does not exist yet")


def _settings(alpha: float) -> Any:
    def write(writer: Any) -> None:
        keys = gguf_library().Keys
        writer.add_string(keys.General.TYPE, "adapter")
        writer.add_string(keys.Adapter.TYPE, "lora")
        writer.add_float32(keys.Adapter.LORA_ALPHA, alpha)

    return write


def write_gguf(
    path: Path, architecture: str, settings: Any, tensors: list[tuple[str, Any]], dtype: str, alpha: float = 0.0
) -> GgufFile:
    """Write beside and rename. settings(writer) adds the keys."""
    library = gguf_library()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        writer = library.GGUFWriter(str(partial), architecture)
        settings(writer)
        for name, tensor in tensors:
            array, kind = encoded(tensor, dtype)
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return GgufFile(path, len(tensors), path.stat().st_size, alpha)
